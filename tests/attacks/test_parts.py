"""Attacks on the router alone and along given routes, on the mixture of test_adaptive.py and on a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adaptive import COUNT, EPS, _case, _mixture

from advmoe_jax.attacks import parts, pgd
from advmoe_jax.ops import balls, routing


def _models():
    weights, x, y, eps = _case()
    return jax.tree_util.Partial(_mixture, weights), x, y


def _choices(routed_fn, x):
    return routed_fn(x, routing.hard())[1]["expert_ids"]


def test_the_router_is_turned_whatever_the_answer():
    """Turning the first layer takes 0.9 of the budget in one direction; a label that is wrong from the start is none
    the matter."""
    routed_fn, x, _ = _models()
    clean = _choices(routed_fn, x)
    x_adv = parts.on_router(pgd.Config(eps=EPS, num_steps=10))(routed_fn, jax.random.key(0), x, clean)
    assert np.all(_choices(routed_fn, x_adv)[:, 0] != clean[:, 0])
    assert float(balls.norm(x_adv - x, "linf").max()) <= EPS * (1 + 1e-5)
    few = parts.on_router(pgd.Config(eps=EPS / 2, num_steps=10))(routed_fn, jax.random.key(0), x, clean)
    np.testing.assert_array_equal(_choices(routed_fn, few), clean)


@pytest.mark.parametrize("early_stop", [pytest.param(False, marks=pytest.mark.slow), True])
def test_routes_are_held(early_stop):
    """Each image's route is its own, in the order of the batch, also where rows leave it: what comes back is what the
    attack gives where all take that route."""
    routed_fn, x, y = _models()
    routes = jnp.stack([jnp.arange(COUNT) % 2, jnp.zeros(COUNT, int)], 1)
    attack = parts.on_routes(pgd.Config(eps=EPS, num_steps=25, early_stop=early_stop))
    x_adv = attack(routed_fn, jax.random.key(0), x, y, routes)
    for expert in (0, 1):
        alone = attack(routed_fn, jax.random.key(0), x, y, jnp.full_like(routes, expert))
        mine = np.arange(COUNT) % 2 == expert
        np.testing.assert_array_equal(x_adv[mine], alone[mine])
    labels = jnp.argmax(routed_fn(x_adv, routing.fixed(routes))[0], -1)
    np.testing.assert_array_equal(labels == y, routes[:, 0] == 0)
