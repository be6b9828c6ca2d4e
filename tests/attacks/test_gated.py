"""Attacks that know of a gate, on mixtures of two experts whose weakness is the gate, or an expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import gated, parse, pgd
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls

SHAPE, CLASSES, COUNT = (4, 4, 1), 3, 12
EPS = {"linf": 0.05, "l2": 0.4, "l1": 1.0}


def _mixture(weights, x):
    """Expert 0 is always right, expert 1 always wrong; the one of the larger gate logit answers alone, so that no
    gradient of the logits reaches the gate. That of expert 1 is linear in the image."""
    flat = x.reshape(x.shape[0], -1) - 0.5
    scores = jnp.stack([jnp.full(x.shape[0], weights["bias"]), flat @ weights["gate"]], -1)
    right = 4 * jax.nn.one_hot(jnp.full(x.shape[0], 1), CLASSES) + 0 * flat[:, :1]
    wrong = 4 * jax.nn.one_hot(jnp.full(x.shape[0], 2), CLASSES)
    members = jnp.stack([right, wrong], 1)
    lead = jnp.argmax(scores, -1)
    return jnp.take_along_axis(members, lead[:, None, None], 1)[:, 0], {"member_logits": members, "gate_logits": scores}


@functools.cache
def _case(norm="linf", within=0.9):
    """The gate can be turned by `within` times the budget, in one direction only."""
    numbers = np.random.default_rng(0)
    gate = numbers.choice([-1., 1.], 16) * numbers.uniform(0.5, 1.5, 16)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    x = np.full((COUNT, *SHAPE), 0.5) + numbers.uniform(-1e-4, 1e-4, (COUNT, *SHAPE))
    weights = {"gate": jnp.asarray(gate, jnp.float32),
               "bias": jnp.float32(within * EPS[norm] * np.linalg.norm(gate, dual))}
    return weights, jnp.asarray(x, jnp.float32), jnp.ones(COUNT, jnp.int32)


def _attack(mode, norm="linf", within=0.9, **more):
    weights, x, y = _case(norm, within)
    attack = gated.make(gated.Config(mode=mode, norm=norm, num_steps=20, **{"eps": EPS[norm]} | more))
    return attack(jax.tree_util.Partial(_mixture, weights), jax.random.key(0), x, y)


def _robust(x_adv, norm="linf", within=0.9):
    weights, x, y = _case(norm, within)
    assert np.all(np.asarray(balls.norm(x_adv - x, norm)) <= EPS[norm] * (1 + 1e-5))
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    return float(np.mean(np.argmax(_mixture(weights, x_adv)[0], -1) == y))


def test_an_attack_that_ignores_the_gate_misses():
    weights, x, y = _case()
    model = jax.tree_util.Partial(lambda w, u: _mixture(w, u)[0], weights)
    assert _robust(pgd.make(pgd.Config(eps=EPS["linf"]))(model, jax.random.key(0), x, y)) == 1
    assert _robust(_attack("constant")) == _robust(_attack("expert")) == 1


@pytest.mark.parametrize("norm", gated.ABOUT.norms)
@pytest.mark.parametrize("mode", ["through", "lead", "misdirect"])
def test_the_gate_is_turned(mode, norm):
    within = 0.6 if norm == "l1" else 0.9  # SLIDE spends a part of its budget on the random start
    assert _robust(_attack(mode, norm, within), norm, within) == 0


@pytest.mark.parametrize("mode", gated.MODES)
def test_verdicts_are_those_of_the_mixture(mode):
    """Where the budget does not reach, an expert that is wrong counts for nothing; and eps 0 changes nothing."""
    assert _robust(_attack(mode, within=1.2), within=1.2) == 1
    np.testing.assert_array_equal(_attack(mode, eps=0.0), _case()[1])


def _linear(weights, x):
    """Experts that are linear in the image, mixed evenly; each is broken in a direction of its own."""
    flat = x.reshape(x.shape[0], -1) - 0.5
    right = jnp.einsum("bd,md->bm", flat, weights) + 0.3
    members = jnp.stack([jnp.zeros_like(right), right, jnp.zeros_like(right) - 9], -1)
    scores = jnp.zeros(right.shape)
    return jnp.mean(members, 1), {"member_logits": members, "gate_logits": scores}


@pytest.mark.parametrize("mode", ["constant", "expert", "through"])
def test_the_experts_are_attacked(mode):
    weights = jnp.asarray(np.random.default_rng(1).choice([-1., 1.], (2, 16)), jnp.float32)
    x, y = _case()[1:]
    model = jax.tree_util.Partial(_linear, weights)
    spec = gated.make(gated.Config(mode=mode, eps=0.08, num_steps=20))
    assert float(np.mean(np.argmax(model(x)[0], -1) == y)) == 1
    assert float(np.mean(np.argmax(model(spec(model, jax.random.key(0), x, y))[0], -1) == y)) == 0


def test_inside_a_jitted_function():
    weights, x, y = _case()
    attack = gated.make(gated.Config(mode="lead", num_steps=20, eps=EPS["linf"]))
    inside = jax.jit(lambda w, x: attack(jax.tree_util.Partial(_mixture, w), jax.random.key(0), x, y))(weights, x)
    np.testing.assert_allclose(inside, _attack("lead"), atol=1e-6)


def test_an_image_that_is_wrong_already_comes_back():
    weights, x, y = _case()
    attack = gated.make(gated.Config(eps=EPS["linf"], num_steps=20))
    np.testing.assert_array_equal(attack(jax.tree_util.Partial(_mixture, weights), jax.random.key(0), x, 0 * y), x)


@pytest.mark.parametrize("text, words", [
    ("gated(mode=trough)", "did you mean 'through'"), ("gated(num_steps=0)", "num_steps of gated is 0")])
def test_bad_settings(text, words):
    with pytest.raises(UserError, match=words):
        parse.attacks(text)


def test_it_says_what_a_model_lacks():
    _, x, y = _case()
    plain = jax.tree_util.Partial(lambda u: (u.reshape(COUNT, -1)[:, :CLASSES], {}))
    with pytest.raises(UserError, match="gated reads member_logits, gate_logits"):
        gated.make()(plain, jax.random.key(0), x, y)
