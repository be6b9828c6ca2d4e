"""Where a team stops: known values, and the rule that saves members against all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import stopping
from advmoe_jax.ops.stopping import GATES, Rule

SURE = [[(.9, .05, .05), (.8, .1, .1), (.9, .05, .05)]]
UNSURE = [[(.4, .35, .25), (.5, .3, .2), (.8, .1, .1), (.9, .05, .05)]]
RULES = (*(Rule(gate, most_change=0.02, least_confidence=0.7) for gate in GATES), Rule(combiner="max"))


def _random(members=5, rows=3000, seed=0):
    """From nearly sure members to nearly uniform ones."""
    numbers = np.random.default_rng(seed)
    logits = numbers.normal(size=(rows, members, 4)) * numbers.choice([0.1, 1, 5], (rows, 1, 1))
    shared = numbers.normal(size=(rows, 1, 4)) * numbers.choice([0, 1, 5], (rows, 1, 1))
    return jax.nn.softmax(jnp.asarray(logits + shared, jnp.float32))


def test_known_values():
    found = stopping.stop(jnp.array(SURE))
    np.testing.assert_allclose(found.q, [[.81, .7137, .7503]], atol=5e-5)
    np.testing.assert_allclose(found.p, [[.81, .1356, .0408]], atol=5e-5)
    assert found.z.tolist() == [1] and stopping.asked(jnp.array(SURE)).tolist() == [1]
    found = stopping.stop(jnp.array(UNSURE))
    np.testing.assert_allclose(found.q, [[.16, .2014, .3124, .4164]], atol=5e-5)
    np.testing.assert_allclose(found.p, [[.16, .1692, .2096, .1921]], atol=5e-5)
    np.testing.assert_allclose(found.probabilities, [[.5667, .25, .1833]], atol=5e-5)
    assert found.z.tolist() == [3] and stopping.asked(jnp.array(UNSURE)).tolist() == [4]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_holds_for_every_rule(rule):
    probabilities = _random(rows=500)
    found = jax.jit(lambda p: stopping.stop(p, rule))(probabilities)
    assert np.all((found.q >= 0) & (found.q <= 1)) and np.all((found.z >= 1) & (found.z <= 5))
    np.testing.assert_allclose(np.sum(found.p, 1) + np.prod(1 - found.q, 1), 1, atol=1e-5)
    np.testing.assert_allclose(np.sum(found.probabilities, 1), 1, atol=1e-5)
    means = stopping.answers(probabilities, rule.combiner)
    rows = np.arange(500)
    np.testing.assert_array_equal(found.probabilities, means[rows, found.z - 1])
    expected = np.einsum("bm,bmk->bk", found.p / found.p.sum(1, keepdims=True), means)
    np.testing.assert_allclose(jax.jit(lambda p: stopping.expected(p, rule))(probabilities), expected, atol=1e-5)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(jnp.log(stopping.expected(p, rule)[:, 0]))))(probabilities)
    assert np.all(np.isfinite(slope)) and np.any(slope)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_members_that_need_not_be_asked_change_nothing(rule):
    """One after the other, as images leave: with what is asked until then the team stops where it stops with all."""
    probabilities = _random()

    @jax.jit
    def at_every_stage(probabilities):
        over = [stopping.is_over(probabilities[:, :t], rule) for t in range(1, 5)]
        flat = jnp.full_like(probabilities, 0.25)  # those that are not asked could as well be anything
        return jnp.stack([*over, jnp.ones_like(over[0])], 1), [stopping.stop(jnp.concatenate(
            [probabilities[:, :t], flat[:, t:]], 1), rule) for t in range(1, 6)]

    whole, asked = jax.jit(lambda p: (stopping.stop(p, rule), stopping.asked(p, rule)))(probabilities)
    over, parts = at_every_stage(probabilities)
    np.testing.assert_array_equal(asked, np.argmax(over, 1) + 1)
    assert np.all(asked >= whole.z) and 1 < asked.mean() < 5
    for t, part in enumerate(parts, 1):
        rows = np.asarray(asked == t)
        np.testing.assert_array_equal(part.z[rows], whole.z[rows])
        np.testing.assert_array_equal(part.probabilities[rows], whole.probabilities[rows])


def test_equal_members_are_one():
    one = _random(1)
    for rule in RULES:
        found = stopping.stop(jnp.repeat(one, 4, 1), rule)
        np.testing.assert_allclose(found.probabilities, one[:, 0], atol=1e-6)
        if rule.gate == "product":
            assert np.all(found.z == 1)
        alone = stopping.stop(one, rule)
        np.testing.assert_allclose(alone.probabilities, one[:, 0], atol=1e-6)
        assert np.all(alone.z == 1)


def test_a_gate_that_is_shut_opens_at_the_end():
    rule = Rule("thresholds", least_confidence=0.99)
    found = stopping.stop(jnp.array(UNSURE), rule)
    assert found.q.tolist() == [[0, 0, 0, 1]] and found.z.tolist() == [4]
    assert stopping.asked(jnp.array(UNSURE), rule).tolist() == [4]


def test_the_largest_of_each_class_is_no_less_than_the_mean():
    probabilities = _random(rows=100)
    largest = jax.lax.cummax(probabilities, 1)
    assert np.all(largest >= stopping.answers(probabilities) - 1e-6)
    np.testing.assert_allclose(stopping.answers(probabilities, "max"), largest / largest.sum(-1, keepdims=True),
                               rtol=1e-5)


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean 'product'"):
        Rule("produkt")
    with pytest.raises(UserError, match="combiner"):
        Rule(combiner="median")
