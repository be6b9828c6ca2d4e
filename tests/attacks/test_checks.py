"""What cannot be attacked is one line, of every attack and of AutoAttack; what rounding did is mended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from advmoe_jax.attacks import parse
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import autoattack, suites

X = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (8, 3, 3, 1)), jnp.float32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).standard_normal((9, 5)), jnp.float32)
KEY = jax.random.key(0)


def _apply(weights, x):
    return (x.reshape(len(x), -1) - 0.5) @ weights


MODEL = jax.tree_util.Partial(_apply, WEIGHTS)
Y = jnp.argmax(MODEL(X), -1)


class Normalised(nnx.Module):
    """In train mode: it writes its statistics."""

    def __init__(self):
        self.norm = nnx.BatchNorm(9, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x.reshape(len(x), -1))


def _one(x=X, y=Y, key=KEY, logits_fn=MODEL):
    return parse.attack("pgd", num_steps=1).run(logits_fn, key, x, y)


def _suite(x=X, y=Y, key=KEY, logits_fn=MODEL):
    return autoattack.run(logits_fn, x, y, eps="8/255", key=key, suite="pgd(num_steps=1)")


def _image_alone(x=X, key=KEY):
    return parse.attack("rotation").run(None, key, x, None)


BAD = [
    (dict(x=2 * X), r"from \S+ to 1.9\d+: expected .0, 1."), (dict(x=X - 0.1), "expected .0, 1."),
    (dict(x=1.00002 * X / X.max()), r"to 1.0000\d+: expected"),
    (dict(x=X.at[0, 0, 0, 0].set(jnp.nan)), "NaN or infinite"),
    (dict(x=(255 * X).astype(jnp.uint8)), "uint8: expected floats"), (dict(x=X[..., 0]), "expected .B, H, W, C."),
    (dict(x=X[:0]), "B at least 1"),
    (dict(key=0), "key is 0: expected jax.random.key"), (dict(key=jnp.zeros(3, jnp.uint32)), "expected jax.random.key"),
    (dict(key=jax.random.split(KEY, 3)), "key has shape .3,.: expected one key"),
    (dict(y=Y[:5]), "whole numbers of shape .8,."), (dict(y=Y.astype(jnp.float32)), "float32"),
    (dict(y=jax.nn.one_hot(Y, 5)), "argmax.-1. of one-hot labels"), (dict(y=Y + 3), "expected 0 to 4"),
    (dict(y=Y - 1), "expected 0 to 4"),
    (dict(logits_fn=lambda x: x), "expected .8, K. logits"),
    (dict(logits_fn=lambda x: x[:, 0, 0, 0]), "expected .8, K. logits"),
    (dict(logits_fn=lambda x: (MODEL(x), {})), "gives tuple"),
    (dict(logits_fn=lambda x: MODEL(x).astype(int)), "int32 of shape .8, 5. for 8 images: expected"),
    (dict(logits_fn=lambda x: jnp.asarray(np.asarray(MODEL(x)))), "cannot trace logits_fn: TracerArray"),
    (dict(logits_fn=jax.tree_util.Partial(lambda w, x: np.asarray(x) @ w, WEIGHTS)), "cannot trace logits_fn"),
    (dict(logits_fn=Normalised()), "cannot trace logits_fn.*evaluation mode")]


@pytest.mark.parametrize("change, words", BAD, ids=[f"{n}-{next(iter(case[0]))}" for n, case in enumerate(BAD)])
def test_bad_input_is_one_line(change, words):
    for attack in (_one, _suite, *([_image_alone] if not change.keys() & {"y", "logits_fn"} else [])):
        with pytest.raises(UserError, match=words) as caught:
            attack(**change)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, words", [
    (dict(x=(255 * X).astype(jnp.uint8)), "uint8"), (dict(y=jax.nn.one_hot(Y, 5)), "one-hot")])
def test_shapes_and_types_are_looked_at_inside_jit(change, words):
    with pytest.raises(UserError, match=words):
        jax.jit(lambda x, y: _one(x, y))(**dict(x=X, y=Y) | change)


def test_rounding_is_clipped():
    grey = jnp.round(X * 4) / 4
    beyond = grey + jnp.where(grey == 1, 2e-6, 0) - jnp.where(grey == 0, 2e-6, 0)
    assert beyond.max() > 1 and beyond.min() < 0
    for attack in (_one, _suite):
        np.testing.assert_array_equal(attack(x=beyond), attack(x=grey))
    half = _one(x=X.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_keys_of_both_kinds():
    both = KEY, jax.random.PRNGKey(0)
    np.testing.assert_array_equal(*map(lambda key: _one(key=key), both))
    np.testing.assert_array_equal(*map(lambda key: _one(key=jax.random.split(key, 8)), both))
    np.testing.assert_array_equal(*map(lambda key: _suite(key=key), both))


def test_half_precision_is_broken_as_well():
    """APGD keeps losses and gradients from step to step."""
    model = jax.tree_util.Partial(lambda w, x: _apply(w, x).astype(jnp.float16), WEIGHTS)
    report = autoattack.run_report(model, X, Y, 0.1, suite="apgd(num_steps=6)")
    assert report.robust_accuracy < report.standard_accuracy == 1 and report.x_adv.dtype == np.float32


def test_budgets_that_no_image_uses_up():
    for norm, eps, most in (("l2", 128, 3), ("l1", 3000, 9)):
        with pytest.raises(UserError, match=f"eps {eps} in {norm}.*at most {most} apart"):
            autoattack.run(MODEL, X, Y, eps, norm, suite="pgd")
        suites.check_shape(suites.together("pgd", norm, most), X.shape[1:])
