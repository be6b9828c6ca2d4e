"""Which units are kept, against counting by hand."""

import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import shares
from advmoe_jax.core.errors import UserError
from advmoe_jax.pruning import admm, masks


@pytest.mark.parametrize("count, keep, expected", [
    (10, "0.9", 9), (10, 0.9, 9), (100, 0.8, 80), (5120, 0.95, 4864), (16, "9/16", 9), (7, 0.5, 4), (3, 1, 3),
    (100, 0.05, 5), (1, 0.01, 1)])
def test_counts_are_exact(count, keep, expected):
    assert shares.kept(count, shares.share(keep)) == expected


@pytest.mark.parametrize("value", ["9/0", "half", 1.5, -0.1, "nan", None])
def test_a_share_that_is_none(value):
    with pytest.raises(UserError, match="keep is"):
        shares.share(value, "keep")


def _units(shape, unit):
    """The places of each unit, in order, and those that each selection is from."""
    kh, kw, inputs, outputs = shape
    every = list(itertools.product(range(kh), range(kw), range(inputs), range(outputs)))
    place = {"weight": lambda a, b, i, o: (a, b, i, o), "kernel": lambda a, b, i, o: (i, o),
             "filter": lambda a, b, i, o: (o,), "column": lambda a, b, i, o: (a, b, i),
             "block(4,1)": lambda a, b, i, o: (a, b, i, o // 4), "block(2,1)": lambda a, b, i, o: (a, b, i, o // 2),
             "grouped(2)": lambda a, b, i, o: (i, o // (outputs // 2)), "grouped": lambda a, b, i, o: (i, o)}[unit]
    units = {}
    for at in every:
        units.setdefault(place(*at), []).append(at)
    return dict(sorted(units.items()))


def _by_hand(score, keep, unit, norm):
    units = _units(score.shape, unit)
    size = {name: sum(score[at] for at in places) if norm == "l1" else np.sqrt(sum(score[at]**2 for at in places))
            for name, places in units.items()}
    pools = {}
    for name in units:
        pools.setdefault(name[-1] if unit.startswith("grouped") else 0, []).append(name)
    mask = np.zeros(score.shape, bool)
    for names in pools.values():
        removed = int((1 - Fraction(str(keep))) * len(names))
        for name in sorted(names, key=lambda name: (-size[name], name))[:len(names) - removed]:
            for at in units[name]:
                mask[at] = True
    return mask


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("unit", ["weight", "kernel", "filter", "column", "block(4,1)", "block(2,1)", "grouped(2)",
                                  "grouped"])
def test_units_of_a_layer(unit, norm):
    """Scores of few values, so that there are ties."""
    score = np.random.default_rng(0).integers(0, 3, (3, 3, 5, 8)).astype(np.float64)
    for keep in (0.3, "9/16", 1):
        found = masks.select({"a": score}, keep, unit=unit, norm=norm)["a"]
        expected = _by_hand(score, Fraction(str(keep)), unit, norm)
        np.testing.assert_array_equal(np.broadcast_to(found, score.shape), expected)


def test_the_first_of_equal_scores_are_kept():
    assert masks.select({"a": jnp.ones((10, 1))}, 0.3)["a"].ravel().tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize("values", ["few", "tiny", "zeros"])
def test_the_largest_are_those_of_sorting(values):
    """Of rows with ties, denormal numbers and both zeros; the number may be traced."""
    rows = {"few": np.random.default_rng(0).integers(0, 3, (3, 17)), "zeros": np.tile([0., -0.], (3, 9))[:, :17],
            "tiny": np.random.default_rng(0).random((3, 17)) * 1e-42}[values].astype(np.float32)
    order = np.argsort(-rows, -1, kind="stable")
    for count in (0, 1, 8, 17):
        expected = np.zeros(rows.shape, bool)
        np.put_along_axis(expected, order[:, :count], True, -1)
        np.testing.assert_array_equal(masks._largest_of_rows(jnp.asarray(rows), count), expected)


@pytest.mark.parametrize("keep, expected", [(0.5, [1, 0, 1, 1, 0]), (0.2, [1, 0, 0, 0, 0]), (0.8, [1, 1, 1, 1, 0])])
def test_filters_of_hydra(keep, expected):
    """floor((1 - keep) * n) of n filters go, by the l1 norm of their scores; in floats (1 - 0.8) * 5 would be 0."""
    score = np.array([4, .7, 4, 2, .1]) / 4 * np.ones((2, 1, 2, 1))
    assert np.ravel(masks.select({"a": score}, keep, unit="filter")["a"]).tolist() == expected


def test_a_global_budget_is_of_all_layers_together():
    scores = {"b": jnp.array([[5., 1.], [2., 2.]]), "a": jnp.array([[3.], [0.]])}
    found = masks.select(scores, 0.5, scope="global")
    assert found["b"].tolist() == [[True, False], [True, False]] and found["a"].ravel().tolist() == [True, False]
    with pytest.warns(UserWarning, match="nothing of a is kept"):
        found = masks.select(scores, "1/3", scope="global", unit="filter")
    assert found["b"].tolist() == [[True, False]] and not found["a"].any()


def test_a_selection_may_be_traced():
    score = jnp.arange(12.).reshape(3, 4)
    traced = jax.jit(lambda s: masks.select({"a": s}, 0.25, unit="filter"))(score)["a"]
    assert traced.tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("change, message", [
    (dict(unit="filters"), "unknown unit 'filters'.*'filter'"), (dict(unit="block(3,1)"), "divides"),
    (dict(unit="grouped(3)"), "divides"), (dict(keep=0), "more than 0"), (dict(keep=2), "from 0 to 1"),
    (dict(scope="all"), "scope"), (dict(norm="l3"), "norm"), (dict(unit="grouped", scope="global"), "expected 'layer'"),
    (dict(scores={"a": -jnp.ones((2, 8))}), "scores of a are negative"),
    (dict(scores={"a": jnp.full((2, 8), jnp.nan)}), "NaN"), (dict(scores={"a": jnp.ones((3, 2, 8))}), "kernel"),
    (dict(unit="block(2,2)"), "unit"), (dict(unit="block(0,1)"), "unit")])
def test_what_cannot_be_selected(change, message):
    given = dict(scores={"a": jnp.ones((1, 1, 2, 8))}, keep=0.5) | change
    with pytest.raises(UserError, match=message):
        masks.select(given.pop("scores"), given.pop("keep"), **given)


def test_harp():
    """Rates and budget, with the numbers of their formulas."""
    for q, expected in ((0., .5025), (-2., .123607), (masks.inverse_rate(.05, .05), .05)):
        np.testing.assert_allclose(masks.rate(jnp.float32(q), .05), expected, rtol=1e-5)
    assert abs(masks.inverse_rate(.05, .05) + 3.049799) < 1e-6
    sizes = {"a": 300, "b": 100}
    q = {path: jnp.float32(masks.inverse_rate(.1, .05)) for path in sizes}
    np.testing.assert_allclose(masks.budget_loss(q, sizes, .05), 1, rtol=1e-5)
    assert masks.budget_loss({path: jnp.float32(-9) for path in sizes}, sizes, .05) == 0


def test_straight_through():
    """An exact count, the first of equal scores, and gradients as of the scores."""
    scores = jnp.zeros((100,)).at[7].set(1)
    mask = masks.straight_through(scores, jnp.float32(.05))
    assert np.flatnonzero(mask).tolist() == [0, 1, 2, 3, 7]
    for count, keep, expected in ((5120, .95, 4864), (10, .9, 9), (100, .8, 80), (1000, 1., 1000)):
        assert masks.straight_through(jnp.arange(float(count)), jnp.float32(keep)).sum() == expected
    weights = jnp.linspace(-1, 2, 100)
    d_scores, d_keep = jax.grad(lambda s, k: jnp.sum(weights * masks.straight_through(s, k)), (0, 1))(scores, .5)
    np.testing.assert_array_equal(d_scores, weights)
    np.testing.assert_allclose(d_keep, weights.sum(), rtol=1e-5)


def test_admm():
    """W and its pruned copy meet: with W held, U grows by what is not kept."""
    kernel = jnp.array([[3., -1., 0.5, 2.]])
    assert admm.project(kernel, "1/2").tolist() == [[3., 0., 0., 2.]]
    filters = jnp.array([[1., 2., 0., 1.], [1., 0., 0., 1.5]])
    assert admm.project(filters, .5, "filter").tolist() == [[0., 2., 0., 1.], [0., 0., 0., 1.5]]
    state = admm.begin({"a": kernel}, "1/2", rho=0.5)
    np.testing.assert_allclose(admm.penalty({"a": kernel}, state), .25 * 1.25)
    state = admm.update({"a": kernel}, state, "1/2")
    np.testing.assert_allclose(state.u["a"], [[0., -1., .5, 0.]])
    np.testing.assert_allclose(state.rho, .65)
    state = admm.update({"a": kernel}, state, "1/2")
    np.testing.assert_allclose(state.z["a"], [[3., -2., 0., 0.]])  # W + U is (3, -2, 1, 2); of equal ones the first
    np.testing.assert_allclose(state.u["a"], [[0., 0., 1., 2.]])
