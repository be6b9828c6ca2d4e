"""Attacks that know of the router, on mixtures of two experts whose weakness is the router."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import adaptive, parse, pgd
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls, routing

SHAPE, CLASSES, COUNT, EPS = (4, 4, 1), 3, 12, 0.05


def _mixture(weights, x, route):
    """Expert 0 always gives the label that weights hold, expert 1 another one; the score of expert 0 is linear in the
    image. Two layers choose, the second one's choice counts for nothing."""
    flat = x.reshape(x.shape[0], -1) - 0.5
    scores = jnp.stack([flat @ weights["router"] + weights["bias"], jnp.zeros(x.shape[0])], -1)
    other = jnp.stack([jnp.ones(x.shape[0]) + flat[:, 0], jnp.zeros(x.shape[0])], -1)
    gate, ids = routing.gates(scores, route, 0)
    _, other_ids = routing.gates(other, route, 1)
    right = 4 * jax.nn.one_hot(weights["label"], CLASSES)
    wrong = 4 * jax.nn.one_hot((weights["label"] + 1) % CLASSES, CLASSES)
    logits = gate[:, :1] * right[None] + gate[:, 1:] * wrong[None]
    return logits, {"router_logits": jnp.stack([scores, other], 1), "expert_ids": jnp.stack([ids, other_ids], 1)}


@functools.cache
def _case(norm="linf", within=0.9):
    """The router can be turned by `within` times the budget, in one direction only."""
    numbers = np.random.default_rng(0)
    router = numbers.choice([-1., 1.], 16) * numbers.uniform(0.5, 1.5, 16)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    eps = {"linf": EPS, "l2": 0.4, "l1": 1.0}[norm]
    x = np.full((COUNT, *SHAPE), 0.5) + numbers.uniform(-1e-4, 1e-4, (COUNT, *SHAPE))
    weights = {"router": jnp.asarray(router, jnp.float32), "label": jnp.int32(1),
               "bias": jnp.float32(within * eps * np.linalg.norm(router, dual))}
    return weights, jnp.asarray(x, jnp.float32), jnp.ones(COUNT, jnp.int32), eps


def _robust(x_adv, norm="linf", within=0.9):
    weights, x, y, eps = _case(norm, within)
    assert np.all(np.asarray(balls.norm(x_adv - x, norm)) <= eps * (1 + 1e-5)) and x_adv.min() >= 0 and x_adv.max() <= 1
    logits, _ = _mixture(weights, x_adv, routing.hard())
    return float(np.mean(np.argmax(logits, -1) == y))


def _attack(mode, norm="linf", within=0.9, **more):
    weights, x, y, eps = _case(norm, within)
    attack = adaptive.make(adaptive.Config(mode=mode, norm=norm, eps=eps, num_steps=20, **more))
    return attack(jax.tree_util.Partial(_mixture, weights), jax.random.key(0), x, y)


def test_the_attack_that_ignores_the_router_misses():
    weights, x, y, eps = _case()
    model = jax.tree_util.Partial(lambda w, u: _mixture(w, u, routing.hard())[0], weights)
    assert _robust(pgd.make(pgd.Config(eps=eps))(model, jax.random.key(0), x, y)) == 1


@pytest.mark.parametrize("norm", adaptive.ABOUT.norms)
@pytest.mark.parametrize("mode", ["soft", "router", "joint", "expert"])
def test_the_router_is_turned(mode, norm):
    within = 0.6 if norm == "l1" else 0.9  # SLIDE spends a part of its budget on the random start
    assert _robust(_attack(mode, norm, within), norm, within) == 0


@pytest.mark.parametrize("mode", adaptive.MODES)
def test_verdicts_are_those_of_hard_routing(mode):
    """Where the budget does not reach, soft mixtures that are wrong count for nothing."""
    assert _robust(_attack(mode, within=1.2), within=1.2) == 1


def _linear(weights, x, route):
    """Two linear experts, and a linear router that favours the first one."""
    flat = x.reshape(x.shape[0], -1) - 0.5
    scores = jnp.stack([1 + flat @ weights["router"], jnp.zeros(x.shape[0])], -1)
    gate, ids = routing.gates(scores, route, 0)
    mixed = gate[:, :1] * (flat @ weights["first"]) + gate[:, 1:] * (flat @ weights["second"])
    return mixed, {"router_logits": scores[:, None], "expert_ids": ids[:, None]}


@functools.cache
def _linear_case():
    numbers = np.random.default_rng(1)
    shapes = {"first": (16, CLASSES), "second": (16, CLASSES), "router": (16,)}
    weights = {name: jnp.asarray(numbers.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(numbers.uniform(0.3, 0.7, (COUNT, *SHAPE)), jnp.float32)
    return weights, x, jnp.argmax(_linear(weights, x, routing.hard())[0], -1)


@pytest.mark.parametrize("mode", adaptive.MODES)
def test_the_experts_are_attacked_too(mode):
    weights, x, y = _linear_case()
    x_adv = adaptive.make(adaptive.Config(mode=mode, eps=0.2, num_steps=20))(
        jax.tree_util.Partial(_linear, weights), jax.random.key(0), x, y)
    assert np.mean(np.argmax(_linear(weights, x_adv, routing.hard())[0], -1) == y) < 0.5


@pytest.mark.parametrize("mode", adaptive.MODES)
def test_in_a_jitted_function_and_one_by_one(mode):
    weights, x, y = _linear_case()
    keys = jax.random.split(jax.random.key(3), COUNT)
    attack = adaptive.make(adaptive.Config(mode=mode, eps=0.1, num_steps=10))
    model = jax.tree_util.Partial(_linear, weights)
    whole = attack(model, keys, x, y)
    traced = jax.jit(lambda w, k, u, v: attack(jax.tree_util.Partial(_linear, w), k, u, v))(weights, keys, x, y)
    rows = jnp.asarray([5, 3])
    part = attack(model, keys[rows], x[rows], y[rows])
    for other, expected in ((traced, whole), (part, whole[rows])):
        apart = np.abs(other - expected).max((1, 2, 3)) > 2e-5
        assert apart.sum() <= len(apart) // 4
        assert np.array_equal(*(np.argmax(model(u, routing.hard())[0], -1) for u in (other, expected)))


def test_an_image_that_is_wrong_already_comes_back():
    weights, x, _, _ = _case()
    attack = adaptive.make(adaptive.Config(eps=EPS, num_steps=5))
    np.testing.assert_array_equal(attack(
        jax.tree_util.Partial(_mixture, weights), jax.random.key(0), x, jnp.zeros(COUNT, jnp.int32)), x)


@pytest.mark.parametrize("text, words", [
    ("adaptive(mode=jiont)", "did you mean 'joint'"), ("adaptive(num_steps=2)", "num_steps of adaptive is 2"),
    ("adaptive(eps=8)", "8/255")])
def test_bad_settings(text, words):
    with pytest.raises(UserError, match=words):
        parse.attacks(text)


def test_it_says_that_it_needs_routes():
    assert (parse.attack("adaptive").about.takes, parse.attack("pgd").about.takes) == ("routed", "logits")


def test_it_says_what_a_model_lacks():
    _, x, y, _ = _case()
    plain = jax.tree_util.Partial(lambda u, route: (u.reshape(COUNT, -1)[:, :CLASSES], {"expert_ids": y[:, None]}))
    with pytest.raises(UserError, match="adaptive reads router_logits: expected a model that gives router_logits, exp"):
        adaptive.make()(plain, jax.random.key(0), x, y)
