"""Weights that go and come while a sparse network trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.systems import flying_bird
from advmoe_jax.train.state import State


def test_small_layers_keep_more():
    layers = tuple(LayerSpec(name, kernel, kernel[-1], 1, (1, 1), None, ()) for name, kernel in (
        ("first", (3, 3, 1, 8)), ("wide", (3, 3, 64, 64)), ("linear", (64, 10))))
    sizes = np.array([np.prod(spec.kernel) for spec in layers])
    for keep in (0.1, 0.5, 0.9):
        found = flying_bird.erdos_renyi(layers, keep)
        assert np.sum(np.array(list(found.values())) * sizes) == pytest.approx(keep * sizes.sum(), rel=1e-4)
        assert max(found.values()) <= 1 and found["wide"] == min(found.values())
    low = flying_bird.erdos_renyi(layers, 0.02)
    assert low["first"] / low["wide"] == pytest.approx((15 / 72) / (134 / 36864), rel=1e-3)


def test_the_smallest_go_and_as_many_come():
    kernel = jnp.array([[0.0, 3.0, -0.1, 2.0], [0, 0, 0.5, 0]])
    mask = jnp.array([[False, True, True, True], [True, False, True, False]])  # one that it keeps is still zero
    noise = jnp.array([[0.9, 1, 1, 1], [1, 0.2, 1, 0.7]])
    found = jax.jit(flying_bird.changed)(kernel, mask, jnp.float32(0.4), noise)
    np.testing.assert_array_equal(found, [[True, True, False, True], [False, False, True, True]])
    np.testing.assert_array_equal(flying_bird.changed(kernel, mask, jnp.float32(0.1), noise), mask)
    whole, ones = jnp.ones((2, 2), bool), jnp.ones((2, 2))
    np.testing.assert_array_equal(flying_bird.changed(ones, whole, jnp.float32(0.5), ones), whole)


def test_optimizers_forget_what_the_network_lacks():
    inner, stem = jnp.array([True, False]), jnp.array([[False], [True]])
    masks = {"backbone": {"block": {"conv1": {"kernel": inner}}, "conv1": {"kernel": stem}}}
    trace = jax.tree.map(lambda mask: jnp.full(mask.shape, 5.0), masks["backbone"])
    state = State(jnp.int32(0), {}, {}, {"backbone": (None, {"trace": trace}, jnp.int32(3))}, masks)
    _, rested, count = flying_bird._rested(state).opt["backbone"]
    np.testing.assert_array_equal(rested["trace"]["block"]["conv1"]["kernel"], [5, 0])
    np.testing.assert_array_equal(rested["trace"]["conv1"]["kernel"], [[0], [5]])
    assert count == 3


@pytest.mark.parametrize("fields, said", [
    (("system.change_every=0 steps",), "system.change_every is '0 steps'"), (("init_from=base",), "sparse from its"),
    (("system.rate=1",), "system.rate is '1'")])
def test_bad_input(fields, said):
    config = configs.default(system="flying_bird")
    configs.override_all(config, list(fields))
    with pytest.raises(UserError, match=said):
        configs.check(config)
