"""A plain closure is attacked as it is now, whatever it was before, and compiled once while it stays the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import apgd, driver, objectives, pgd
from advmoe_jax.evaluation import autoattack

X = jnp.full((4, 2, 2, 3), 0.5)
Y = jnp.zeros(4, jnp.int32)
WEIGHTS = jnp.ones((12, 3)).at[:, 0].set(2.0)  # images are broken by darkening them; by brightening them, negated
pgd_3 = pgd.make(pgd.Config(norm="linf", eps="8/255", num_steps=3))


def _logits(x, weights):
    return x.reshape(len(x), -1) @ weights


class Model:
    """With weights and a scale that may be replaced."""

    def __init__(self, weights):
        self.weights, self.scale = weights, 1.0

    def __call__(self, x):
        return self.logits(x)

    def logits(self, x):
        return self.scale * _logits(x, self.weights)

    def drawn(self, x, keys):
        return self(x) + 0 * jax.vmap(jax.random.uniform)(keys)[:, None]


def test_other_weights_are_another_model():
    """In the same closure, as when a model trains on between two evaluations."""
    model = Model(WEIGHTS)
    attack = functools.partial(pgd_3, lambda x: model(x), jax.random.key(0), X, Y)
    before = attack()
    model.weights = -WEIGHTS
    after = attack()
    assert np.all(before < X) and np.all(after > X)


def test_other_weights_inside_a_program():
    @jax.jit
    def twice(weights):
        model = Model(weights)
        attack = functools.partial(pgd_3, lambda x: model(x), jax.random.key(0), X, Y)
        before = attack()
        model.weights = -weights
        return before, attack()

    before, after = twice(WEIGHTS)
    assert np.all(before < X) and np.all(after > X)


@pytest.mark.filterwarnings("ignore:evaluation UNRELIABLE")  # such models have no gradient of DLR
def test_a_report_is_of_the_model_as_it_is():
    uneven = jnp.tile(jnp.array([1.0, -1.0]), 6)
    model = Model(jnp.zeros((12, 3)).at[:, 0].set(uneven + 0.001))
    report = functools.partial(autoattack.run_report, lambda x: model(x), X, Y, eps=0.1, suite="fgsm")
    assert report().robust_accuracy == 0
    model.weights = jnp.zeros((12, 3)).at[:, 0].set(uneven + 0.5)
    assert report().robust_accuracy == 1


@pytest.mark.parametrize("closure", [
    lambda model: lambda: model,
    lambda model: lambda: model.logits,  # another object each time
    lambda model: functools.partial(lambda function: function, lambda x: model(x))],
    ids=["object", "method", "function"])
def test_what_makes_another_model(closure):
    """Other arrays, numbers, and what was written into numpy's arrays; nothing else."""
    model = Model(np.array(WEIGHTS))
    function = closure(model)

    def same():
        return objectives.partial(function(), X)

    first = same()
    assert same() is first
    model.weights[0, 0] = 7
    second = same()
    assert second is not first and same() is second
    model.scale = 2.0
    third = same()
    assert third is not second
    model.weights = jnp.asarray(model.weights)
    fourth = same()
    assert fourth is not third and same() is fourth
    np.testing.assert_allclose(fourth(X), model(X))


def test_the_same_closure_is_compiled_once():
    model = Model(WEIGHTS)
    attack = functools.partial(pgd_3, model.logits, jax.random.key(0), X)
    attack(Y)
    compiled = driver._steps._cache_size(), driver._step._cache_size()
    attack(Y + 1)
    assert compiled == (driver._steps._cache_size(), driver._step._cache_size())


def test_few_closures_are_remembered():
    models = [Model(WEIGHTS) for _ in range(2 * objectives._MOST_CLOSURES)]
    for model in models:
        objectives.partial(model, X)
    assert len(objectives._closures) == objectives._MOST_CLOSURES
    assert [closure.function for closure in objectives._closures.values()] == models[-objectives._MOST_CLOSURES:]


def test_a_random_closure_gets_keys():
    attack = apgd.make(apgd.Config(eps=0.1, num_steps=2, eot=2))
    assert np.all(attack(Model(WEIGHTS).drawn, jax.random.key(0), X, Y) <= X)
