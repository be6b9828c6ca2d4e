"""Attacks that look for the smallest perturbation, and MSD, against closed forms on models made for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import cw_l2, ddn, deepfool, driver, msd, objectives, parse, rays
from advmoe_jax.attacks.settings import BEYOND
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls, losses

SHAPE = (5, 5, 1)
DUAL = {"linf": 1, "l2": 2}
FAR = {"linf": 1.0, "l2": 5.0}  # eps beyond every boundary


def _linear(weights, x):
    return x.reshape(x.shape[0], -1) @ weights["w"] + weights["b"][None]


@functools.cache
def _case(classes, n=24):
    """A linear model, and images so far inside the box that it never matters and not right at a boundary."""
    numbers = np.random.default_rng(classes)
    x = jnp.asarray(numbers.uniform(0.3, 0.7, (10 * n, *SHAPE)), jnp.float32)
    w = jnp.asarray(numbers.standard_normal((25, classes)), jnp.float32)
    weights = {"w": w, "b": -jnp.mean(x.reshape(len(x), -1), 0) @ w}
    x = x[np.flatnonzero(_nearest(weights, x, "l2") > 0.04)[:n]]
    return weights, x, jnp.argmax(_linear(weights, x), -1)


def _distances(classes, norm):
    return _nearest(*_case(classes)[:2], norm)


def _nearest(weights, x, norm):
    """Distance of each image to its boundary, in float64."""
    y = jnp.argmax(_linear(weights, x), -1)
    w, b = (np.asarray(weights[name], np.float64) for name in "wb")
    logits = np.asarray(x, np.float64).reshape(len(x), -1) @ w + b
    rows, y = np.arange(len(x)), np.asarray(y)
    gaps = logits[rows, y][:, None] - logits
    lengths = np.linalg.norm(w[:, None, :] - w[:, y, None], DUAL[norm], axis=0)
    return np.where(gaps > 0, gaps / np.maximum(lengths, 1e-9), np.inf).min(1)


def _attack(name, fn, weights, x, y, **settings):
    return parse.attack(name, **settings).run(jax.tree_util.Partial(fn, weights), jax.random.key(0), x, y)


def _sizes(x_adv, x, norm):
    return np.asarray(balls.norm(x_adv - x, norm))


def _broken(fn, weights, x_adv, y):
    return np.asarray(objectives.misclassified(fn(weights, x_adv), y))


# name, norm, classes, settings, and how far beyond the boundary it may end, relative to its distance.
CASES = [
    ("deepfool", "linf", 4, {}, 0.022), ("deepfool", "l2", 4, {}, 0.022),
    ("ddn", "l2", 2, dict(num_steps=200), 0.01),
    ("cw_l2", "l2", 4, dict(num_steps=200, binary_search_steps=6, c=0.01, learning_rate=0.005), 0.02),
    ("rays", "linf", 2, dict(num_queries=1500), 0.02)]
each = pytest.mark.parametrize("name, norm, classes, settings, above", CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])


@functools.cache
def _found(number):
    """Images and distances that an attack found without a budget."""
    name, norm, classes, settings, _ = CASES[number]
    weights, x, y = _case(classes)
    x_adv = _attack(name, _linear, weights, x, y, norm=norm, eps=0.0, beyond="keep", **settings)
    return x_adv, _sizes(x_adv, x, norm)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_distance_to_the_boundary_of_a_linear_model(number):
    name, norm, classes, _, above = CASES[number]
    weights, _, y = _case(classes)
    x_adv, distance = _found(number)
    expected = _distances(classes, norm)
    assert np.all(_broken(_linear, weights, x_adv, y))
    assert np.all(distance >= expected * (1 - 1e-3) - 1e-6)
    assert np.all(distance <= expected * (1 + above)), np.max(distance / expected)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_robust_accuracy_curve(number):
    """The images within eps are those that are broken, and they are the ones whose boundary is."""
    name, norm, classes, settings, above = CASES[number]
    weights, x, y = _case(classes)
    expected, distance = _distances(classes, norm), _found(number)[1]
    middle = np.sort(expected)[:-1] + np.diff(np.sort(expected)) / 2
    for eps in middle[[4, 16]]:
        x_adv = _attack(name, _linear, weights, x, y, norm=norm, eps=float(eps), **settings)
        robust = ~_broken(_linear, weights, x_adv, y)
        np.testing.assert_array_equal(robust, distance > np.float32(eps))
        clear = (eps < expected) | (eps > expected * (1 + above))
        np.testing.assert_array_equal(robust[clear], (expected > eps)[clear])
        assert clear.sum() >= len(x) - 2 and 0 < robust.mean() < 1


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_the_scale_of_the_logits_does_not_matter(number):
    """C&W's c is in units of them."""
    name, norm, classes, settings, _ = CASES[number]
    weights, x, y = _case(classes)
    for scale in (1e-6, 1e6):
        more = settings | (dict(c=settings["c"] / scale) if name == "cw_l2" else {})
        x_adv = _attack(name, _linear, {k: scale * w for k, w in weights.items()}, x, y, norm=norm, eps=0.0,
                        beyond="keep", **more)
        np.testing.assert_allclose(_sizes(x_adv, x, norm), _found(number)[1], rtol=2e-3)


@each
def test_beyond(name, norm, classes, settings, above):
    """What comes back where the boundary is further than eps."""
    weights, x, y = _case(classes)
    number = [case[:2] for case in CASES].index((name, norm))
    found, distance = _found(number)
    eps = float(np.median(distance))
    back = {beyond: _attack(name, _linear, weights, x, y, norm=norm, eps=eps, beyond=beyond, **settings)
            for beyond in BEYOND}
    near = distance <= np.float32(eps)
    assert 0.3 < near.mean() < 0.7
    for x_adv in back.values():
        np.testing.assert_array_equal(x_adv[near], found[near])
    np.testing.assert_array_equal(back["clean"][~near], x[~near])
    np.testing.assert_array_equal(back["keep"], found)
    np.testing.assert_allclose(_sizes(back["project"], x, norm)[~near], eps, rtol=1e-4)
    apart = (back["project"] - x) * (distance / eps)[:, None, None, None] - (found - x)
    np.testing.assert_allclose(apart[~near], 0, atol=1e-5)


@pytest.mark.parametrize("name, norm, classes, settings, above", CASES[2:], ids=[case[0] for case in CASES[2:]])
def test_early_stop_gives_the_same_verdicts_for_less(name, norm, classes, settings, above):
    weights, x, y = _case(classes)
    eps = float(np.quantile(_distances(classes, norm), 0.7))
    robust, passes = [], []
    for early_stop in (False, True):
        with driver.counted() as ledger:
            x_adv = _attack(name, _linear, weights, x, y, norm=norm, eps=eps, early_stop=early_stop, driver="host",
                            **settings)
        robust.append(~_broken(_linear, weights, x_adv, y))
        passes.append(ledger.forward)
        assert np.all(_sizes(x_adv, x, norm) <= eps * (1 + 1e-5))
    np.testing.assert_array_equal(*robust)
    assert 0.1 < robust[0].mean() < 0.5 and passes[1] < 0.8 * passes[0]


def test_images_that_are_wrong_when_clean_come_back():
    weights, x, y = _case(4)
    y = y.at[:5].add(1) % 4
    for name, norm, _, settings, _ in CASES:
        x_adv = _attack(name, _linear, weights, x, y, norm=norm, eps=FAR[norm], **settings | dict(num_queries=40)
                        if name == "rays" else settings)
        np.testing.assert_array_equal(x_adv[:5], x[:5])
        assert np.any(x_adv[5:] != x[5:])


# DeepFool.


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_deepfool_reaches_a_linear_boundary_in_one_step(norm):
    weights, x, y = _case(2)
    x_adv = _attack("deepfool", _linear, weights, x, y, norm=norm, eps=FAR[norm], num_steps=1)
    np.testing.assert_allclose(_sizes(x_adv, x, norm), 1.02 * _distances(2, norm) + 1.02e-5, rtol=1e-4)
    assert np.all(_broken(_linear, weights, x_adv, y))


def test_deepfool_lengthens_the_sum_of_its_steps_once():
    """Not each step by itself, of which the sum would grow faster."""
    def fn(_, x):
        s = jnp.mean(x, (1, 2, 3)) - 0.5
        return jnp.stack([jnp.zeros_like(s), jnp.tanh(20 * s) - 0.95], -1)

    x = jnp.full((1, *SHAPE), 0.5)
    s = total = steps = 0
    while (gap := np.tanh(20 * s) - 0.95) <= 0:
        total += abs(gap) / (20 / np.cosh(20 * s)**2) + 1e-5
        s, steps = 1.5 * total, steps + 1
    assert steps > 1
    x_adv = _attack("deepfool", fn, None, x, jnp.zeros(1, int), norm="linf", eps=1.0, overshoot=0.5)
    np.testing.assert_allclose(_sizes(x_adv, x, "linf"), s, rtol=1e-4)


def test_deepfool_considers_the_largest_logits():
    """The nearest boundary is that of the class of the smallest logit, which two candidates leave out."""
    w = np.zeros((25, 3), np.float32)
    w[0, 1], w[1, 2] = 1, 10
    weights = {"w": jnp.asarray(w), "b": jnp.asarray([0., -0.8, -5.9])}
    x, y = jnp.full((2, *SHAPE), 0.5), jnp.zeros(2, int)
    for candidates, distance in ((2, 0.3), (3, 0.09), (10, 0.09)):
        x_adv = _attack("deepfool", _linear, weights, x, y, norm="l2", eps=5.0, candidates=candidates)
        np.testing.assert_allclose(_sizes(x_adv, x, "l2"), 1.02 * distance, rtol=1e-3)


def test_deepfool_needs_one_forward_pass_a_step():
    weights, x, y = _case(4)
    with driver.counted() as ledger:
        _attack("deepfool", _linear, weights, x, y, norm="l2", num_steps=3, driver="host")
    assert (ledger.executed_forward, ledger.executed_backward) == (len(x) * (1 + 4), len(x) * 3 * 4)


# DDN.


def test_ddn_step_sizes():
    np.testing.assert_allclose(ddn.step_size(jnp.asarray([0., 50., 100.]), 100.), [1, 0.505, 0.01], rtol=1e-5)


def test_ddn_levels():
    weights, x, y = _case(4)
    x = jnp.round(x * 255) / 255
    on_grid = {}
    for levels in (0, 256):
        x_adv = _attack("ddn", _linear, weights, x, y, eps=5.0, levels=levels)
        steps = 255 * np.asarray(x_adv)
        on_grid[levels] = np.abs(steps - np.round(steps)).max() < 1e-3
        assert np.all(_broken(_linear, weights, x_adv, y))
    assert on_grid == {0: False, 256: True}


def test_ddn_norm_shrinks_and_grows_by_gamma():
    weights, x, y = _case(2)
    inputs = driver.Inputs(jax.tree_util.Partial(_linear, weights),
                           dict(keys=rng.rowwise(jax.random.key(0), 24), x=x, y=y),
                           dict(eps=0., start_eps=0.02, gamma=0.1, num_steps=9.))
    program = ddn._DDN(0, "keep", False)
    step = jax.jit(functools.partial(driver._advance, program))
    carry, radius, seen = program.start(inputs), np.full(24, 0.02), []
    for i in range(10):
        broken = _broken(_linear, weights, carry["x"], y)
        seen.append(broken)
        radius = radius * np.where(broken, 0.9, 1.1)
        carry = step(inputs, carry, i)
        np.testing.assert_allclose(_sizes(carry["x"], x, "l2"), radius, rtol=1e-4)
    assert 0 < np.mean(seen) < 1
    most = step(inputs, carry | dict(radius=carry["radius"] + 9), 0)
    np.testing.assert_allclose(most["radius"], _sizes(jnp.maximum(x, 1 - x), 0, "l2"), rtol=1e-5)


def test_ddn_moves_on_a_dead_gradient():
    weights, x, y = _case(2)
    x_adv = _attack("ddn", lambda w, u: jax.lax.stop_gradient(_linear(w, u)), weights, x, y, eps=5.0, beyond="keep",
                    num_steps=60)
    assert np.mean(_sizes(x_adv, x, "l2") > 0) > 0.5


# C&W.


def test_cw_margin_is_the_confidence():
    weights, x, y = _case(4)
    settings = dict(num_steps=100, binary_search_steps=5, c=0.1, eps=5.0)
    for confidence in (0.0, 1.0):
        x_adv = _attack("cw_l2", _linear, weights, x, y, confidence=confidence, **settings)
        margin = np.asarray(losses.margin(_linear(weights, x_adv), y))
        assert np.all(margin >= confidence) and np.all(margin < confidence + 0.2)


def test_cw_searches_c_as_the_paper_does():
    """c fails, 10 c fails, 100 c succeeds: then halfway, up or down."""
    program, c = cw_l2._CW(1, 9, "clean", False), jnp.asarray([1.0])
    now, tried = dict(c=c, low=0 * c, high=0 * c + jnp.inf, search=0), []
    for succeeded in (False, False, True, False, True):
        tried.append(float(now["c"][0]))
        now = program._next_c(jnp.full((1, *SHAPE), 0.5), now | dict(succeeded=jnp.asarray([succeeded])))
    assert tried + [float(now["c"][0])] == [1, 10, 100, 55, 77.5, 66.25] and now["search"] == 5


def test_cw_images_go_through_their_searches_alone():
    """One whose loss does not fall goes on to its next c after a tenth of the steps; the others are not held up."""
    weights, x, y = _case(2)
    still = jnp.arange(24) < 12
    weights = weights | {"still": still}

    def fn(weights, u):
        moving = _linear(weights, u)
        return jnp.where(weights["still"][:, None], jax.lax.stop_gradient(moving), moving)

    inputs = driver.Inputs(
        jax.tree_util.Partial(fn, weights), dict(x=x, y=y),
        {name: jnp.float32(n) for name, n in dict(eps=0., c=1., confidence=0., learning_rate=0.01).items()})
    program = cw_l2._CW(20, 2, "keep", False)
    step = jax.jit(functools.partial(driver._advance, program))
    carry, ended = program.start(inputs), np.zeros(24, int)
    for i in range(42):
        ended = np.where(carry["through"], ended, i)
        carry = step(inputs, carry, i)
    assert np.all(carry["through"]) and np.all(ended[:12] == 5) and np.all(ended[12:] > 5)


def test_cw_of_torchattacks_is_within_reach():
    config = cw_l2.Config(c=1.0, num_steps=50, binary_search_steps=1)
    assert cw_l2.label(config) == "cw-l2-50" and cw_l2.label(cw_l2.Config()) == "cw-l2-9x1000"
    weights, x, y = _case(4)
    with driver.counted() as ledger:
        x_adv = cw_l2.make(dataclasses.replace(config, eps=5.0, driver="host"))(
            jax.tree_util.Partial(_linear, weights), jax.random.key(0), x, y)
    assert ledger.executed_backward <= len(x) * 51
    assert np.mean(_broken(_linear, weights, x_adv, y)) > 0.9


# RayS.


def test_rays_sees_labels_only():
    """Logits of another scale and shape, but the same order, give the same images bit for bit."""
    weights, x, y = _case(4)
    found = [_attack("rays", lambda w, u: change(_linear(w, u)), weights, x, y, eps=0.5, num_queries=200, beyond="keep")
             for change in (lambda z: z, lambda z: 1e6 * z, lambda z: z**3, jax.lax.stop_gradient)]
    assert np.all(_broken(_linear, weights, found[0], y))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    labels = rays._labels(lambda z: z, jnp.asarray([[0., 2., 1.], [jnp.nan, 0., 1.], [0., 0., 0.]]))
    np.testing.assert_array_equal(labels, [1, -1, 0])


def _corner(corner, x):
    """Broken within 0.1 of one image only."""
    near = jnp.max(jnp.abs(x - corner[None]), (1, 2, 3)) < 0.1
    return jnp.stack([jnp.zeros_like(near, x.dtype), near - 0.5], -1)


@pytest.mark.parametrize("query, off", [(1, range(8)), (2, range(4)), (3, range(4, 8)), (4, [0, 1]), (7, [6, 7]),
                                        (8, [0]), (15, [7])])
def test_rays_asks_for_halves_of_halves_of_the_image(query, off):
    """After the clean image comes the corner with all signs flipped, then halves, quarters, ... with channels first."""
    corner = np.ones(8, np.float32)
    corner[list(off)] = 0
    corner = jnp.moveaxis(jnp.asarray(corner).reshape(2, 2, 2), 0, -1)
    x, y = jnp.full((1, 2, 2, 2), 0.5), jnp.zeros(1, int)
    for queries, hit in ((query, False), (query + 1, True)):
        x_adv = _attack("rays", _corner, corner, x, y, eps=1.0, num_queries=queries)
        assert np.all(x_adv[0] == (corner if hit else x[0])), (queries, hit)


def test_rays_blocks_tile_the_image():
    for dim in (1, 7, 25, 3072):
        for level in range(13):
            first, end = (np.asarray(edge)[:2**level] for edge in rays.block(level, np.arange(2**12), dim))
            size = -(-dim // 2**level)
            used = first < dim
            np.testing.assert_array_equal(first, size * np.arange(2**level))
            assert end[used][-1] == dim and np.all(end[:-1][used[1:]] == first[1:][used[1:]])


def _rays_one_by_one(weights, x, label, queries):
    """The paper's algorithms as plain loops: the radius (an l2 length) and the signs (C, H, W) after some queries."""
    dim, left = x.size, queries - 1
    signs, best = np.ones(dim, np.float32), np.inf

    def succeeds(radius, signs):
        nonlocal left
        left -= 1
        u = np.clip(x + np.moveaxis((radius / np.sqrt(dim) * signs).reshape(np.moveaxis(x, -1, 0).shape), 0, -1), 0, 1)
        return np.argmax(_linear(weights, u[None].astype(np.float32))) != label

    level = start = 0
    while left > 0:
        size = int(np.ceil(dim / 2**level))
        attempt = signs.copy()
        attempt[start:start + size] *= -1
        if succeeds(best, attempt):
            low, high = 0.0, min(best, np.sqrt(dim))
            while left > 0:
                middle = (low + high) / 2
                low, high = (low, middle) if succeeds(middle, attempt) else (middle, high)
                if high - low <= 1e-3:
                    if high < best:
                        best, signs = high, attempt
                    break
        start += size
        if start >= dim:
            level, start = level + 1, 0
    return best, signs


@pytest.mark.parametrize("queries", [40, 150, 400])
def test_rays_is_the_same_as_plain_loops(queries):
    numbers = np.random.default_rng(5)
    weights = {"w": numbers.standard_normal((12, 3)).astype(np.float32), "b": np.zeros(3, np.float32)}
    weights["w"][7] = 0  # flipping it changes nothing and must not be taken for better
    x = numbers.uniform(0.2, 0.8, (4, 3, 2, 2)).astype(np.float32)
    y = np.argmax(_linear(weights, x), -1)
    program = rays._RayS("linf", "keep", False)
    inputs = driver.Inputs(jax.tree_util.Partial(_linear, weights),
                           dict(x=jnp.asarray(x), y=jnp.asarray(y)), dict(eps=jnp.float32(0)))
    carry = jax.lax.fori_loop(0, queries, lambda i, carry: program.step(inputs, carry, i), program.start(inputs))
    for row in range(4):
        radius, signs = _rays_one_by_one(weights, x[row], y[row], queries)
        assert np.isfinite(radius)
        np.testing.assert_allclose(carry["radius"][row] * np.sqrt(12), radius, rtol=1e-5)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(carry["signs"][row]), -1, 0).ravel(), signs)


def test_rays_l2_distance_of_a_linear_model():
    """The nearest image along rays of signs: r sqrt(d) with the linf distance r."""
    weights, x, y = _case(2)
    x_adv = _attack("rays", _linear, weights, x, y, norm="l2", eps=0.0, num_queries=1500, beyond="keep")
    expected = 5 * _distances(2, "linf")
    distance = _sizes(x_adv, x, "l2")
    assert np.all(distance >= expected * (1 - 1e-3)) and np.all(distance <= expected * 1.02 + 2e-3)


def test_rays_counts_its_queries():
    """Each image alone: one that is near is through early, and what it had would have been enough."""
    weights, x, y = _case(2)
    y = y.at[0].set(1 - y[0])
    eps = float(np.quantile(_distances(2, "linf"), 0.6))
    inputs = driver.Inputs(jax.tree_util.Partial(_linear, weights),
                           dict(x=x, y=y), dict(eps=jnp.float32(eps)))
    end = {early_stop: driver.run(rays._RayS("linf", "clean", early_stop), inputs, 500)
           for early_stop in (False, True)}
    assert end[False]["queries"][0] == 1 and np.all(end[False]["queries"][1:] == 500)
    queries, broken = np.asarray(end[True]["queries"]), np.asarray(end[True]["broken"])
    np.testing.assert_array_equal(broken, end[False]["broken"])
    assert np.all(queries[~broken] == 500) and np.all(queries[broken] < 500) and len(set(queries[broken])) > 3
    for used, enough in ((0, True), (-1, False)):
        row = int(np.argmax(np.where(broken, queries, 0)))
        alone = inputs._replace(rows=jax.tree.map(lambda leaf: leaf[row][None], inputs.rows))
        assert driver.run(rays._RayS("linf", "clean", True), alone, int(queries[row]) + used)["broken"][0] == enough


# MSD.


def _three_kinds(weights, x):
    """The last pixel says which of three weights counts; its gradient is 0."""
    kind = jax.lax.stop_gradient(jnp.round(2 * x[:, -1, -1, 0]).astype(int))
    w, b = weights["w"][kind], weights["b"][kind]
    gap = jnp.sum(w * (x.reshape(x.shape[0], -1) - 0.5), -1) - b
    return jnp.stack([jnp.zeros_like(gap), gap], -1)


@functools.cache
def _kinds():
    """Images that only a linf, only an l2 or only an l1 perturbation of its budget can break."""
    w = np.zeros((3, 100), np.float32)
    w[0, :98], w[1, :10], w[2, :2] = 1, 1, 1
    weights = {"w": jnp.asarray(w), "b": jnp.asarray([7., 1.4, 0.85])}
    x = np.full((6, 10, 10, 1), 0.5, np.float32)
    x[:, -1, -1, 0] = [0, 0.5, 1, 0, 0.5, 1]
    return weights, jnp.asarray(x), jnp.zeros(6, int)


BUDGETS = {"linf": 0.1, "l2": 0.5, "l1": 1.2}
MSD = dict(eps_linf=0.1, eps_l2=0.5, eps_l1=1.2, step_linf=0.02, step_l2=0.1, step_l1=0.01)


def _inside(x_adv, x):
    return {norm: _sizes(x_adv, x, norm) <= eps * (1 + 1e-5) for norm, eps in BUDGETS.items()}


def test_msd_finds_what_each_norm_alone_does_not():
    weights, x, y = _kinds()
    for number, norm in enumerate(BUDGETS):
        x_adv = _attack("pgd", _three_kinds, weights, x, y, norm=norm, eps=BUDGETS[norm], num_steps=60)
        np.testing.assert_array_equal(_broken(_three_kinds, weights, x_adv, y), np.arange(6) % 3 == number)
    x_adv = _attack("msd", _three_kinds, weights, x, y, num_steps=60, **MSD)
    assert np.all(_broken(_three_kinds, weights, x_adv, y))
    inside = _inside(x_adv, x)
    for number, norm in enumerate(BUDGETS):
        np.testing.assert_array_equal(inside[norm], np.arange(6) % 3 == number)


def _trap(_, x):
    """a is the first pixel's change up to 0.03, b the mean of the others'; the boundary lies at a = b = 0.03.

    Near the image b seems to help when it falls. Only once a is large, which an l2 step does at once and a linf step,
    which moves b as much, never does, it helps when it grows.
    """
    delta = (x - 0.5).reshape(x.shape[0], -1)
    a, b = jnp.minimum(delta[:, 0], 0.03), jnp.mean(delta[:, 1:], -1)
    over = a + b - 0.02
    gap = a + jnp.where(over > 0, 10 * over, -0.5 * over) - 0.3
    return jnp.stack([jnp.zeros_like(gap), gap], -1)


def test_msd_finds_what_the_union_of_the_norms_does_not():
    x, y = jnp.full((2, 21, 21, 1), 0.5), jnp.zeros(2, int)
    for norm, eps in dict(linf=0.03, l2=0.06, l1=0.06).items():
        x_adv = _attack("pgd", _trap, None, x, y, norm=norm, eps=eps, num_steps=60, step_size="0.1 eps", start="none")
        assert not np.any(_broken(_trap, None, x_adv, y))
    x_adv = _attack("msd", _trap, None, x, y, eps_l2=0.06, eps_l1=0.06, num_steps=60)
    assert np.all(_broken(_trap, None, x_adv, y)) and np.all(_sizes(x_adv, x, "linf") <= 0.03 * (1 + 1e-5))


def test_msd_keeps_one_of_three_budgets_and_the_best_iterate():
    """On curved models too, and after each number of steps."""
    numbers = np.random.default_rng(3)
    weights = [jnp.asarray(numbers.standard_normal(shape), jnp.float32) for shape in ((100, 12), (12, 4))]

    def fn(weights, u):
        return jnp.sin(jnp.tanh(u.reshape(u.shape[0], -1) @ weights[0] / 4) @ weights[1])

    x = jnp.asarray(np.clip(numbers.uniform(-0.2, 1.2, (16, 10, 10, 1)), 0, 1), jnp.float32)
    y, last = jnp.argmax(fn(weights, x), -1), (np.zeros(16, bool), np.full(16, -np.inf))
    for num_steps in (1, 3, 20):
        x_adv = _attack("msd", fn, weights, x, y, num_steps=num_steps, **MSD)
        inside = np.stack(list(_inside(x_adv, x).values()))
        assert np.all(inside.any(0)) and np.all(_sizes(x_adv, x, "linf") > 0)
        broken, loss = _broken(fn, weights, x_adv, y), np.asarray(losses.cross_entropy(fn(weights, x_adv), y))
        assert np.all(broken >= last[0]) and np.all((loss >= last[1] - 1e-5) | (broken & ~last[0]))
        last = broken, loss
    assert not np.all(inside.all(0)) and last[0].any()


def test_msd_l1_step_moves_5_to_20_coordinates_that_have_room():
    numbers = np.random.default_rng(0)
    grad = jnp.asarray(numbers.standard_normal((400, 8, 8, 1)), jnp.float32)
    u = jnp.asarray(numbers.uniform(0, 1, (400, 8, 8, 1)), jnp.float32).at[:32].set(0.5)
    step = np.asarray(msd._l1_step(grad, u, 0.01, rng.rowwise(jax.random.key(0), 400)))
    moved = np.count_nonzero(step, (1, 2, 3))
    assert set(moved) == set(range(5, 21))
    np.testing.assert_allclose(np.abs(step).sum((1, 2, 3)), 0.2, rtol=1e-5)
    assert np.all(np.asarray(u) + step >= 0) and np.all(np.asarray(u) + step <= 1)
    assert np.all((step == 0) | (np.sign(step) == np.sign(grad)))
    size = np.abs(np.asarray(grad))
    smallest = np.where(step != 0, size, np.inf).min((1, 2, 3))
    assert np.all(np.where(step == 0, size, 0).max((1, 2, 3))[:32] < smallest[:32]), "the largest ones, all with room"


@pytest.mark.parametrize("name, settings, word", [
    ("deepfool", dict(norm="l1"), "l2"), ("deepfool", dict(candidates=1), "2 to"),
    ("deepfool", dict(overshoot=-0.1), "0 to 100"), ("deepfool", dict(beyond="keeps"), "did you mean 'keep'"),
    ("ddn", dict(norm="linf"), "l2"), ("ddn", dict(gamma=1), "at most 0.999"), ("ddn", dict(start_eps=0), "above 0"),
    ("ddn", dict(levels=1), "no rounding"), ("ddn", dict(eps=-1), "0 or more"),
    ("cw_l2", dict(norm="linf"), "l2"), ("cw_l2", dict(c=0), "above 0"),
    ("cw_l2", dict(learning_rate="fast"), "learning_rate"), ("cw_l2", dict(confidence=-1), "0 to"),
    ("cw_l2", dict(binary_search_steps=0), "1 to 100"),
    ("rays", dict(num_queries=0), "1 to"), ("rays", dict(norm="l1"), "linf"),
    ("msd", dict(eps_linf=8), "eps_linf.*8/255"), ("msd", dict(step_l2=-1), "step_l2.*0 or more"),
    ("msd", dict(num_steps=0), "1 to"), ("msd", dict(norm="l2"), "norm")])
def test_bad_settings(name, settings, word):
    with pytest.raises(UserError, match=word) as caught:
        parse.attack(name, **settings)
    assert "\n" not in str(caught.value)


def test_labels():
    assert [module.label(module.Config()) for module in (deepfool, ddn, cw_l2, rays, msd)] == [
        "deepfool", "ddn-100", "cw-l2-9x1000", "rays", "msd-50"]
    assert deepfool.label(deepfool.Config(num_steps=5)) == "deepfool-5"
    assert rays.label(rays.Config(num_queries=500)) == "rays-500"
