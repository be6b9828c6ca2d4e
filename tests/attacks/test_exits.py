"""Attacks on an ensemble of linear members that stops asking when one is sure."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

from advmoe_jax.attacks import exits, parse, pgd
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls

SHAPE, CLASSES, MEMBERS, COUNT, EPS = (4, 4, 1), 3, 3, 24, 0.08


def _ensemble(weights, x):
    """The first member whose confidence is over 0.8 decides, or the last one."""
    logits = jnp.einsum("bd,mdk->bmk", x.reshape(x.shape[0], -1) - 0.5, weights)
    sure = jnp.max(jax.nn.softmax(logits), -1) > 0.8
    used = jnp.where(jnp.any(sure, 1), jnp.argmax(sure, 1), MEMBERS - 1)
    return jnp.take_along_axis(logits, used[:, None, None], 1)[:, 0], {"member_logits": logits, "exits_used": used + 1}


@functools.cache
def _case():
    numbers = np.random.default_rng(0)
    shared = numbers.standard_normal((1, 16, CLASSES))
    weights = jnp.asarray(2 * shared + 1.4 * numbers.standard_normal((MEMBERS, 16, CLASSES)), jnp.float32)
    x = jnp.asarray(numbers.uniform(0.2, 0.8, (COUNT, *SHAPE)), jnp.float32)
    return weights, x, jnp.argmax(_ensemble(weights, x)[0], -1)


def _attack(mode, **more):
    weights, x, y = _case()
    attack = exits.make(exits.Config(mode=mode, num_steps=20, **({"eps": EPS} | more)))
    return attack(jax.tree_util.Partial(_ensemble, weights), jax.random.key(0), x, y)


def _robust(x_adv):
    weights, _, y = _case()
    return np.asarray(jnp.argmax(_ensemble(weights, x_adv)[0], -1) == y)


@pytest.mark.parametrize("mode, norm", slow_but(lambda case: case[1] == "linf" or case[0] == "soft", itertools.product(
    ["average", "probabilities", "each", "best", "soft", "member", "force"], exits.ABOUT.norms)))
def test_breaks_the_dynamic_rule_within_the_budget(mode, norm):
    eps = {"linf": EPS, "l2": 0.35, "l1": 1.5}[norm]
    x_adv = _attack(mode, norm=norm, eps=eps)
    x = _case()[1]
    assert np.all(np.asarray(balls.norm(x_adv - x, norm)) <= eps * (1 + 1e-5)) and x_adv.min() >= 0 and x_adv.max() <= 1
    assert _robust(x_adv).mean() < 0.6


def test_together_they_find_more_than_the_plain_attack():
    """The gradient of the rule sees only the member that decided."""
    weights, x, y = _case()
    model = jax.tree_util.Partial(lambda w, u: _ensemble(w, u)[0], weights)
    plain = _robust(pgd.make(pgd.Config(eps=EPS / 2, num_steps=20))(model, jax.random.key(0), x, y))
    together = np.all([_robust(_attack(mode, eps=EPS / 2)) for mode in exits.MODES], 0)
    assert (plain & together).mean() < plain.mean()


def test_delay_makes_more_members_work():
    weights, x, _ = _case()
    before, after = (np.mean(_ensemble(weights, u)[1]["exits_used"]) for u in (x, _attack("delay", early_stop=False)))
    assert after > before + 0.3


def test_member_attacks_each_in_turn():
    """It breaks what the attack on the first member alone breaks, and more."""
    weights, x, y = _case()
    first = jax.tree_util.Partial(lambda w, u: (_ensemble(w, u)[0], {"member_logits": _ensemble(w, u)[1][
        "member_logits"][:, :1]}), weights)
    alone = exits.make(exits.Config(mode="member", eps=EPS, num_steps=20))(first, jax.random.key(0), x, y)
    found = _robust(_attack("member"))
    assert np.all(found <= _robust(alone)) and found.sum() < _robust(alone).sum()


@pytest.mark.parametrize("text, words", [
    ("exits(mode=avarage)", "did you mean 'average'"), ("exits(num_steps=0)", "num_steps of exits is 0")])
def test_bad_settings(text, words):
    with pytest.raises(UserError, match=words):
        parse.attacks(text)


def test_it_says_what_a_model_lacks():
    _, x, y = _case()
    plain = jax.tree_util.Partial(lambda u: (u.reshape(COUNT, -1)[:, :CLASSES], {}))
    with pytest.raises(UserError, match="exits reads member_logits: expected a model that gives member_logits"):
        exits.make()(plain, jax.random.key(0), x, y)
