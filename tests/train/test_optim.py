"""Schedules by text, and the optimizers that they drive."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.train import optim


def _cfg(**changes):
    return optim.Config(**(dict(
        learning_rate=.1, momentum=.9, weight_decay=5e-4, schedule="constant", warmup="0%", clip_norm=0.) | changes))


def _rates(steps_per_epoch, total, **changes):
    """Of all steps, compiled and not."""
    schedule = optim.schedule(_cfg(**changes), steps_per_epoch, total)
    steps = jnp.arange(total, dtype=jnp.int32)
    rates = np.asarray(jax.jit(jax.vmap(schedule))(steps))
    assert rates.shape == (total,)
    np.testing.assert_allclose(np.broadcast_to(schedule(steps), total), rates, rtol=1e-6, atol=1e-9)
    return rates


@pytest.mark.parametrize("warmup", [0, 234])
@pytest.mark.parametrize("name", ["cosine", "cosine_epoch", "constant"])
def test_optax_gives_the_bits_of_the_formulas(name, warmup):
    lr, total, per_epoch = .1, 4680, 39
    formula = {"cosine": lambda step: .5 * lr * (1 + jnp.cos(jnp.pi * step / total)),
               "cosine_epoch": lambda step: .5 * lr * (1 + jnp.cos(np.pi * (step // per_epoch - 1) / 120)),
               "constant": lambda step: jnp.full((), lr)}[name]
    schedule = optim.schedule(_cfg(schedule=name, warmup=f"{warmup} steps"), per_epoch, total)
    steps = jnp.arange(total, dtype=jnp.int32)

    def expected(step):
        return formula(step) * (jnp.minimum(1, (step + 1) / warmup) if warmup else 1)

    for compiled in (lambda call: call, jax.jit, lambda call: jax.jit(jax.vmap(call))):
        ours, theirs = (np.asarray(compiled(call)(steps), np.float32) for call in (schedule, expected))
        chex.assert_trees_all_equal(*np.broadcast_arrays(ours, theirs))


def test_multistep():
    rates = _rates(5, 20, schedule="multistep(50%:0.1, 3 epochs:1/2)")
    np.testing.assert_allclose(rates, [.1] * 10 + [.01] * 5 + [.005] * 5, rtol=1e-6)
    np.testing.assert_allclose(_rates(5, 4, schedule="multistep(0:3,1 step:2)"), [.3, .6, .6, .6], rtol=1e-6)
    short = _rates(5, 4, schedule="multistep(50%:0.1,55%:0.1)")  # both at step 2
    np.testing.assert_allclose(short, [.1, .1, .001, .001], rtol=1e-6)


def test_piecewise():
    rates = _rates(5, 10, schedule="piecewise(0:0,40%:1,100%:0)")
    np.testing.assert_allclose(rates, [0, .025, .05, .075, .1, .1 * 5 / 6, .1 * 4 / 6, .05, .1 / 3, .1 / 6], atol=1e-8)
    rates = _rates(5, 10, schedule=" piecewise( 2 steps : 2 , 1 epochs : 1/2 ) ")  # level before and after
    np.testing.assert_allclose(rates, [.2, .2, .2, .15, .1, .05, .05, .05, .05, .05], rtol=1e-6)
    for text in ("piecewise(0:1,50%:1,50%:0.1)", "piecewise(0:9,0:1,50%:1,50%:0.1,100%:0.1)"):  # jumps
        np.testing.assert_allclose(_rates(5, 4, schedule=text), [.1, .1, .01, .01], rtol=1e-6)
    np.testing.assert_allclose(_rates(5, 4, schedule="piecewise(50%:0.1)"), [.01] * 4, rtol=1e-6)


def test_warm_up_multiplies_every_schedule():
    for name in ("multistep(2 steps:0.5)", "piecewise(0:1,100%:0)"):
        plain, warm = _rates(1, 8, schedule=name), _rates(1, 8, schedule=name, warmup="50%")
        np.testing.assert_allclose(warm, plain * np.minimum(1, np.arange(1, 9) / 4), rtol=1e-6)


@pytest.mark.parametrize("text", [
    "multistep", "multistep()", "multistep(50%)", "multistep(50%:x)", "multistep(50%:-1)", "multistep(75%:0.1,50%:0.1)",
    "multistep(50%:0.1", "multistep(50%:0.1:2)", "multistep(50%:0.1,)", "multistep(5 hours:0.1)", "multistep 50%:0.1",
    "multistep(50%:inf)", "multistep(50%:1e300)", "multistep(200%:0.1)"])
def test_knots_that_cannot_be_read(text):
    for name in ("multistep", "piecewise"):
        text = text.replace("multistep", name)
        example = {"multistep": "multistep(50%:0.1,75%:0.1)", "piecewise": "piecewise(0:0,40%:1,100%:0)"}[name]
        with pytest.raises(UserError) as error:
            optim.make(_cfg(schedule=text), 5, 20)
        assert str(error.value) == (
            f"optim schedule is {text!r}: expected rising lengths, each with a factor of the learning rate from 0 "
            f"to 1000000, such as {example!r}")


@pytest.mark.parametrize("field, value, message", [
    ("schedule", "cosin", "unknown optim schedule 'cosin': expected one of .*; did you mean 'cosine'?"),
    ("schedule", "multi_step(50%:0.1)", "unknown optim schedule 'multi_step': .*; did you mean 'multistep'?"),
    ("schedule", "", "unknown optim schedule '': expected one of"),
    ("schedule", "cosine epoch", "optim schedule is 'cosine epoch': expected 'cosine' alone"),
    ("schedule", "cosine(50%:0.1)", r"optim schedule is 'cosine\(50%:0.1\)': expected 'cosine' alone"),
    ("warmup", "slow", "optim warmup is 'slow': expected for example"),
    ("warmup", "200%", "optim warmup is '200%': expected at most"),
    ("warmup", "21 steps", "optim warmup is '21 steps', 21 steps: expected at most the 20 of training"),
    ("optimizer", "adamax", "unknown optim optimizer 'adamax': expected one of adam, adamw, sgd; did you mean 'adam"),
])
def test_other_fields_that_cannot_be_read(field, value, message):
    with pytest.raises(UserError, match=f"^{message}"):
        optim.make(_cfg(**{field: value}), 5, 20)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_momentum_of_one_is_refused(name):
    with pytest.raises(UserError, match=f"^optim momentum is 1.0: expected 0 or more and less than 1 for {name}"):
        optim.make(_cfg(optimizer=name, momentum=1.), 1, 3)
    optim.make(_cfg(momentum=1.), 1, 3)


def _course(optimizer, steps=12):
    """Parameters after each of some steps."""
    numbers = np.random.default_rng(0)
    params = {"a": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.ones(2)}
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(numbers.standard_normal(leaf.shape), jnp.float32), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


@pytest.mark.parametrize("name, changes, expected", [
    ("adam", dict(weight_decay=0.), lambda rate: optax.adam(rate, b1=.8)),
    ("adam", {}, lambda rate: optax.chain(optax.add_decayed_weights(.1), optax.adam(rate, b1=.8))),
    ("adamw", {}, lambda rate: optax.adamw(rate, b1=.8, weight_decay=.1)),
    ("adamw", dict(clip_norm=.5),
     lambda rate: optax.chain(optax.clip_by_global_norm(.5), optax.adamw(rate, b1=.8, weight_decay=.1))),
    ("sgd", dict(weight_decay=0.), lambda rate: optax.sgd(rate, momentum=.8)),
    ("sgd", {}, lambda rate: optax.chain(optax.add_decayed_weights(.1), optax.sgd(rate, momentum=.8))),
])
def test_optimizers_are_those_of_optax(name, changes, expected):
    cfg = _cfg(**dict(optimizer=name, momentum=.8, weight_decay=.1, schedule="multistep(50%:0.1)") | changes)
    rate = optax.piecewise_constant_schedule(.1, {6: .1})
    chex.assert_trees_all_close(_course(optim.make(cfg, 1, 12)), _course(expected(rate)), rtol=1e-6, atol=1e-7)


def test_the_first_steps_of_adam_by_hand():
    """The first is the learning rate times the sign; decoupled decay adds rate * decay * parameter, coupled none."""
    for name, decay in (("adam", 0.), ("adamw", .1 * .5 * 2.)):
        optimizer, p = optim.make(_cfg(optimizer=name, weight_decay=.5), 1, 3), jnp.asarray([2., 2.])
        updates, _ = optimizer.update(jnp.asarray([3., -3.]), optimizer.init(p), p)
        np.testing.assert_allclose(updates, [-.1 - decay, .1 - decay], rtol=1e-5, atol=1e-6)


def test_every_second_step():
    """The schedule counts the steps of the training, Adam's averages its updates."""
    cfg = _cfg(optimizer="adam", weight_decay=0., schedule="piecewise(0:1,100%:0)")
    rate = optax.linear_schedule(.1, 0., 12)
    chex.assert_trees_all_close(
        _course(optim.make(cfg, 1, 12, every=2), 6), _course(optax.adam(lambda count: rate(2 * count)), 6), rtol=1e-5)


def test_the_default_is_sgd():
    """Else a run that names no optimizer would not be the paper's."""
    chex.assert_trees_all_equal(_course(optim.make(_cfg(), 1, 3)), _course(optim.make(_cfg(optimizer="sgd"), 1, 3)))
