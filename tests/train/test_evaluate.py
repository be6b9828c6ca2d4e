"""Evaluation on hand-made systems: what is counted, and that nothing depends on the batches."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import parse
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops.statistics import wilson
from advmoe_jax.train import evaluate
from advmoe_jax.train.system import System

COUNT, SHAPE, CLASSES = 53, (4, 4, 1), 3


def _linear(weights, view_gain, x):
    """Logits whose gradient, not their value, the view turns or dims; expert 1 where the mean is high."""
    x_seen = jax.lax.stop_gradient(x) + view_gain * (x - jax.lax.stop_gradient(x))
    logits = x_seen.reshape(x.shape[0], -1) @ weights
    ids = jnp.stack([jnp.mean(x, (1, 2, 3)) > 0.5, jnp.zeros(x.shape[0], bool)], 1).astype(jnp.int32)
    return logits, {"expert_ids": ids}


def _nothing(weights, view_gain, x):
    return _linear(weights, view_gain, x)[0], {}


def _outputs(apply, state, view):
    gain = {"none": 1.0, "ste_selected": 0.0, "ste_full": -1.0}[view]  # the true, a dead and a wrong gradient
    return jax.tree_util.Partial(apply, state, jnp.float32(gain))


def _system(routed):
    return System(init=None, stages=(), outputs_fn=functools.partial(_outputs, _linear if routed else _nothing),
                  views=(), network=types.SimpleNamespace(num_experts=2 if routed else 1), describe="")


@functools.cache
def _case():
    numbers = np.random.default_rng(0)
    weights = jnp.asarray(numbers.standard_normal((16, CLASSES)), jnp.float32)
    images = numbers.integers(0, 256, (COUNT, *SHAPE)).astype(np.uint8)
    logits = images.reshape(COUNT, -1) / 255 @ np.asarray(weights)
    label = np.where(np.arange(COUNT) % 7 == 0, logits.argmin(-1), logits.argmax(-1)).astype(np.int32)
    return weights, {"image": images, "label": label}


def _found(specs, *, batch_size=16, views=("none",), routed=True, indices=None, seed=0):
    weights, arrays = _case()
    specs = parse.attacks(specs) if isinstance(specs, str) else specs
    indices = np.arange(COUNT) if indices is None else indices
    found = evaluate.predictions(_system(routed), weights, arrays, indices, specs, mesh=meshes.make(),
                                 batch_size=batch_size, seed=seed, views=views)
    return found, evaluate.summarize(found, specs, views, 2 if routed else 1)


VIEWS = ("none", "ste_selected", "ste_full")
PGD = "pgd(num_steps=5,eps=0.05)"


@pytest.fixture(scope="module")
def three_views():
    return _found(PGD, views=VIEWS)


def test_every_image_is_counted_once(three_views):
    found, [record] = three_views
    assert COUNT % 16 and record["n"] == COUNT
    assert found["clean"].shape == found["label"].shape == (COUNT,)
    assert found["clean_ids"].shape == (COUNT, 2)
    assert found["attacked"][0]["label"].shape == (3, COUNT) and found["attacked"][0]["ids"].shape == (3, COUNT, 2)
    weights, arrays = _case()
    np.testing.assert_array_equal(found["clean"], (arrays["image"].reshape(COUNT, -1) / 255 @ weights).argmax(-1))
    np.testing.assert_array_equal(found["label"], arrays["label"])
    assert record["sa"] == pytest.approx(1 - np.mean(np.arange(COUNT) % 7 == 0))


@pytest.mark.parametrize("batch_size", [1, 60])
def test_nothing_depends_on_the_batch_size(three_views, batch_size):
    found, _ = _found(PGD, batch_size=batch_size, views=("none",))
    for name in ("clean", "clean_ids"):
        np.testing.assert_array_equal(found[name], three_views[0][name])
    for name in ("label", "ids"):
        np.testing.assert_array_equal(found["attacked"][0][name][0], three_views[0]["attacked"][0][name][0])


def test_a_part_of_the_images_has_the_same_outcomes(three_views):
    """Keys are folded from the index in the data set, not from the position."""
    indices = np.array([40, 3, 17, 22, 9])
    found, _ = _found(PGD, indices=indices)
    np.testing.assert_array_equal(found["attacked"][0]["label"][0], three_views[0]["attacked"][0]["label"][0][indices])


def test_robust_is_who_is_right_when_clean_and_under_every_view(three_views):
    found, [record] = three_views
    survives = (found["clean"] == found["label"]) & (found["attacked"][0]["label"] == found["label"])
    assert record["ra"] == pytest.approx(survives.all(0).mean())
    assert record["ra_by_view"] == pytest.approx(dict(zip(VIEWS, survives.mean(1))))
    assert record["ra"] <= min(record["ra_by_view"].values()) <= max(record["ra_by_view"].values()) <= record["sa"]
    assert 0 < record["ra_by_view"]["none"] < record["ra_by_view"]["ste_selected"], "a dead gradient is a weaker attack"


def test_an_image_that_is_wrong_when_clean_is_not_robust():
    """Even where the attack happens to push it back to its label."""
    found, [record] = _found("fgsm(eps=0.9)", views=("ste_full",))
    assert record["sa"] < 1 and record["ra"] <= record["sa"]
    mended = (found["clean"] != found["label"]) & (found["attacked"][0]["label"][0] == found["label"])
    assert np.any(mended), "the wrong gradient makes images right"


def test_eps_0_is_the_clean_accuracy():
    found, records = _found("fgsm(eps=0) pgd(eps=0,num_steps=5) fgsm(eps=0,norm=l2) fgsm(eps=0,norm=l1)")
    for attacked, record in zip(found["attacked"], records):
        np.testing.assert_array_equal(attacked["label"][0], found["clean"])
        assert record["ra"] == record["sa"] and record["largest_norm"] == 0
        assert record["ra_interval"] == record["sa_interval"] == wilson(round(record["sa"] * COUNT), COUNT)
        assert record["flip_rate"] == [0, 0]


def test_expert_load(three_views):
    found, [record] = three_views
    load = np.array(record["load"])
    assert load.shape == (2, 2) and np.allclose(load.sum(-1), 1)
    high = np.mean(_case()[1]["image"].reshape(COUNT, -1) / 255, 1) > 0.5
    np.testing.assert_allclose(load, [[1 - high.mean(), high.mean()], [1, 0]], atol=1e-6)
    assert 0 < record["load_entropy"][0] <= 1 and record["load_entropy"][1] == pytest.approx(0, abs=1e-6)
    worst = np.mean((found["clean"] == found["label"]) & (found["attacked"][0]["label"] == found["label"]), 1).argmin()
    flips = (found["attacked"][0]["ids"][worst] != found["clean_ids"]).mean(0)
    np.testing.assert_allclose(record["flip_rate"], flips)


def test_a_dense_network_has_no_load():
    found, [record] = _found("fgsm(eps=0.05)", routed=False)
    assert found["clean_ids"] is None and found["attacked"][0]["ids"] is None
    assert not {"load", "load_entropy", "flip_rate"} & record.keys()


def test_record_says_what_was_measured(three_views):
    _, [record] = three_views
    assert (record["attack"], record["norm"], record["eps"], record["eps_value"]) == ("pgd-5", "linf", "0.05", 0.05)
    assert record["settings"]["num_steps"] == "5"
    assert 0 < record["largest_norm"] <= 0.05 * (1 + 1e-4)


def _nan(weights, view_gain, x):
    logits, aux = _linear(weights, view_gain, x)
    return jnp.where(jnp.mean(x, (1, 2, 3), keepdims=True)[..., 0, 0] > 0.5, jnp.nan, logits), aux


def test_nan_logits_are_wrong():
    weights, arrays = _case()
    system = System(None, (), functools.partial(_outputs, _nan), (), types.SimpleNamespace(num_experts=2), "")
    specs = parse.attacks("fgsm(eps=0)")
    found = evaluate.predictions(system, weights, arrays, np.arange(COUNT), specs, mesh=meshes.make(), batch_size=16,
                                 seed=0, views=("none",))
    high = np.mean(arrays["image"].reshape(COUNT, -1) / 255, 1) > 0.5
    assert 0.2 < high.mean() < 0.8
    np.testing.assert_array_equal(found["clean"] == -1, high)
    [record] = evaluate.summarize(found, specs, ("none",), 2)
    assert record["sa"] == pytest.approx(np.mean((np.arange(COUNT) % 7 != 0) & ~high))


@pytest.mark.parametrize("norm, leave", [
    pytest.param("linf", lambda x: jnp.clip(x + 0.2, 0, 1), id="linf"),
    pytest.param("l2", lambda x: jnp.clip(x + 0.1, 0, 1), id="l2"),
    pytest.param("l1", lambda x: jnp.clip(x + 0.05, 0, 1), id="l1"),
    pytest.param("linf", lambda x: x - 0.05, id="below 0"), pytest.param("linf", lambda x: x + 0.05, id="above 1"),
    pytest.param("linf", lambda x: x * jnp.nan, id="nan"),
    pytest.param("linf", lambda x: x.at[3].mul(jnp.nan), id="one nan")])
def test_an_attack_that_leaves_its_budget_is_refused(norm, leave):
    spec = parse.Spec("cheat", parse.attack("fgsm", norm=norm, eps=0.1).config, lambda fn, key, x, y: leave(x))
    with pytest.raises(UserError, match="cheat left its budget.*discarded"):
        _found((spec,))


@pytest.mark.parametrize("successes, n, low, high", [
    (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 263, 0.25529, 0.36621),
    (0, 0, 0.0, 1.0)])
def test_wilson_interval(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)
