"""Each sign of an unreliable evaluation, on a model with that fault and on one without any."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import parse
from advmoe_jax.evaluation import black_box, flags, verdicts

COUNT, SHAPE, CLASSES = 24, (6, 6, 1), 5


@functools.cache
def _case():
    """A small network trained a little, so that its margins are not of noise."""
    numbers = np.random.default_rng(0)
    weights = [jnp.asarray(w, jnp.float32) for w in (
        numbers.standard_normal((36, 16)) / 4, numbers.standard_normal((16, CLASSES)))]
    x = jnp.asarray(numbers.uniform(0.1, 0.9, (COUNT, *SHAPE)), jnp.float32)
    return weights, x, jnp.argmax(_net(weights, x), -1)


def _net(weights, x):
    return jnp.tanh((x.reshape(x.shape[0], -1) - 0.5) @ weights[0]) @ weights[1]


def _flags(apply):
    weights, x, y = _case()
    y %= jax.eval_shape(apply, weights, x).shape[-1]
    found = flags.of_model(jax.tree_util.Partial(apply, weights), x, y, jax.random.key(0))
    assert all("\n" not in flag.reason and "expected" in flag.reason or not flag.unreliable for flag in found)
    return {flag.name for flag in found}


def _random(weights, x):
    noise = jax.pure_callback(lambda: np.random.standard_normal((1,)).astype(np.float32),
                              jax.ShapeDtypeStruct((1,), jnp.float32))
    return _net(weights, x) + noise[0] * jnp.arange(CLASSES)[None]


def _in_train_mode(weights, x):
    """Normalises by the statistics of the batch."""
    z = _net(weights, x)
    return (z - z.mean(0, keepdims=True)) / (z.std(0, keepdims=True) + 1e-5)


def _with_pseudo_random(weights, x):
    return _net(weights, x) + 0 * jax.random.normal(jax.random.key(0), (1, CLASSES))


def _only_near(weights, x):
    """Gives the clean logits wherever an image is far from all clean ones."""
    _, clean, _ = _case()
    far = jnp.abs(x[:, None] - clean[None]).max((2, 3, 4))
    nearest = jnp.argmin(far, -1)
    return jnp.where(far.min(-1)[:, None] > 0.2, _net(weights, clean)[nearest], _net(weights, x))


@jax.custom_vjp
def _flat_spots(x):
    """The identity, with a gradient that is NaN on every fourth image, as sqrt of a variance has on flat ones."""
    return x


_flat_spots.defvjp(lambda x: (x, None), lambda _, dy: (
    jnp.where((jnp.arange(dy.shape[0]) % 4 == 0)[:, None, None, None], jnp.nan, dy),))


def _changed_backward(change):
    """The identity, whose gradient (B, H, W, C) at x is `change(x, gradient)`."""
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, x), lambda x, dy: (change(x, dy),))
    return identity


def _pixel_by_pixel(weights, x):
    """Shows the gradient of a pixel once the one before it has moved."""
    _, clean, _ = _case()
    nearest = clean[jnp.argmin(jnp.abs(x[:, None] - clean[None]).max((2, 3, 4)), -1)]
    moved = (jnp.abs(x - nearest) > 1e-6).reshape(x.shape[0], -1)
    shown = jnp.concatenate([jnp.ones_like(moved[:, :1]), moved[:, :-1]], 1).reshape(x.shape)
    return _net(weights, jnp.where(shown, x, jax.lax.stop_gradient(x)))


def _frozen_away_from_clean(weights, x):
    _, clean, _ = _case()
    away = jnp.abs(x[:, None] - clean[None]).max((2, 3, 4)).min(-1) > 1e-3
    return _net(weights, jnp.where(away[:, None, None, None], jax.lax.stop_gradient(x), x))


def _turned_far_from_clean(x, dy):
    away = jnp.abs(x[:, None] - _case()[1][None]).max((2, 3, 4)).min(-1) > 0.02
    return jnp.where(away[:, None, None, None], -dy, dy)


_backward_field = _changed_backward(_turned_far_from_clean)
_turning = _changed_backward(lambda x, dy: dy * jnp.sign(jnp.sin(1e3 * x[:, :1, :1])))


def _computed_in(dtype):
    return lambda w, x: _net([a.astype(dtype) for a in w], x.astype(dtype))


def _of_grey_levels(w, x):
    z = _net(w, x)
    return z + jax.lax.stop_gradient(jnp.round(16 * z) / 16 - z)


@pytest.mark.parametrize("model, notes", [
    (_net, set()), (_computed_in(jnp.bfloat16), set()), (_computed_in(jnp.float16), set()), (_of_grey_levels, set()),
    (lambda w, x: _computed_in(jnp.bfloat16)(w, x).astype(jnp.float32), set()),
    (lambda w, x: _net(w, x).at[:, 2].set(-jnp.inf), {"masked_class"})])
def test_an_honest_model_has_none(model, notes):
    """In any precision; a class that is masked is a note, and hides no other fault."""
    assert _flags(model) == notes


@pytest.mark.parametrize("fault, name", [
    (lambda w, x: jax.nn.softmax(_net(w, x)), "probabilities"),
    (lambda w, x: _net(w, jax.lax.stop_gradient(x)), "zero_gradient"),
    (lambda w, x: 1e4 * _net(w, x), "zero_gradient"),
    (lambda w, x: _net(w, jnp.round(x * 7) / 7), "zero_gradient"),
    (lambda w, x: _net(w, 2 * jax.lax.stop_gradient(x) - x), "wrong_gradient"),
    (lambda w, x: _net(w, _flat_spots(x)), "nan_gradient"),
    (lambda w, x: jax.nn.softmax(_computed_in(jnp.bfloat16)(w, x)), "probabilities"),
    (lambda w, x: _net(w, 2 * jax.lax.stop_gradient(x) - x).at[:, 2].set(-jnp.inf), "wrong_gradient"),
    (lambda w, x: jnp.log(jax.nn.softmax(100 * _net(w, x))), "not_finite"),
    (lambda w, x: _net(w, _backward_field(x)), "wrong_gradient_later"),
    (_in_train_mode, "batch_dependent"), (_random, "randomised"), (_with_pseudo_random, "dynamic"),
    (lambda w, x: _net(w, jax.lax.stop_gradient(x)), "unbounded_attack_fails"),
    (lambda w, x: _net(w, x + 0.05 * jnp.sin(1e4 * x)), "shattered_gradient"),
    (lambda w, x: _net(w, 2 * jax.lax.stop_gradient(x) - x), "noise_wins"),
    (lambda w, x: _net(w, 2 * jax.lax.stop_gradient(x) - x), "loss_does_not_rise"),
    (_frozen_away_from_clean, "zero_gradient_later"),
    (_pixel_by_pixel, "not_converged"), (lambda w, x: _net(w, _turning(x)), "restarts_win"),
    (_only_near, "not_monotone"),
    (lambda w, x: _net(w, x)[:, :3], "few_classes"),
    (lambda w, x: jnp.where(x.mean((1, 2, 3))[:, None] > 0.5, jnp.nan, _net(w, x)), "not_finite")])
def test_a_fault_is_flagged(fault, name):
    assert name in _flags(fault)


def test_what_does_not_fit_into_memory_is_looked_at_in_part(monkeypatch):
    weights, x, y = _case()
    sizes, look = [], flags._of_model

    def greedy(logits_fn, x, *rest):
        sizes.append(len(x))
        if len(x) > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return look(logits_fn, x, *rest)

    monkeypatch.setattr(flags, "_of_model", greedy)
    found = flags.of_model(jax.tree_util.Partial(lambda w, x: jax.nn.softmax(_net(w, x)), weights), x, y,
                           jax.random.key(0))
    assert sizes == [24, 12, 8] and "probabilities" in {flag.name for flag in found}


def _probe(x):
    numbers = np.random.default_rng(1)
    return 0.3 * (x.reshape(x.shape[0], -1) - 0.5) @ jnp.asarray(numbers.standard_normal((36, CLASSES)), jnp.float32)


def _hard_labels(w, x):
    return 10 * jax.nn.one_hot(jnp.argmax(_net(w, x), -1), CLASSES) + _probe(x)


def _saturated(w, x):
    return jnp.tanh(1e3 * ((x.reshape(x.shape[0], -1) - 0.5) @ w[0])) @ w[1] + _probe(x)


def _second_look(apply, steps=20, checked=True):
    weights, x, _ = _case()
    model = jax.tree_util.Partial(apply, weights)
    y = np.asarray(jnp.argmax(model(x), -1))
    specs = parse.attacks(f"pgd(num_steps={steps})", norm="linf", eps=0.05)
    return verdicts.run({"none": jax.tree_util.Partial(lambda model, x: (model(x), {}), model)}, lambda rows: {
        "image": x[rows], "label": jnp.asarray(y[rows]), "index": jnp.asarray(rows)}, np.arange(COUNT), y, specs,
        key=jax.random.key(0), batch_size=COUNT, survivors_only=False, checks=black_box.checks(specs) * checked)


@pytest.mark.parametrize("model, flagged", [
    (_net, False), (_computed_in(jnp.bfloat16), False), (_hard_labels, True), (_saturated, True),
    (lambda w, x: _net(w, x - 2 * jnp.mod(20 * x, 1) / 20), True)])
def test_a_second_look_without_gradients(model, flagged):
    """Gradients that lead nowhere make hard labels, saturated features and a saw-tooth seem robust."""
    found = _second_look(model)
    said = black_box.flags(found)
    assert any(flag.name == "black_box_wins" and flag.unreliable for flag in said) == flagged
    assert (found.survivors().sum() < found.survivors(found.own).sum() - 1) == flagged, "what falls counts"
    [check] = [attempt for attempt in found.attempts if attempt.is_check]
    assert check.spec.label == "square-300" and not np.any(check.attacked & ~found.survivors(found.own))


def test_a_second_look_never_leaves_a_stronger_attack_more_images():
    weak, strong = (_second_look(_hard_labels, steps) for steps in (2, 20))
    assert not np.any(strong.survivors(strong.own) & ~weak.survivors(weak.own))
    assert not np.any(strong.survivors() & ~weak.survivors())


def test_what_is_not_looked_at_again_is_said():
    [flag] = black_box.flags(_second_look(_net, checked=False))
    assert flag.name == "not_checked" and not flag.unreliable
    assert black_box.flags(_found([("apgd", 40), ("square", 0)])) == ()


@pytest.mark.parametrize("suite, surfaces, added", [
    ("pgd", (), ["square-300 linf 0.1"]), ("pgd square", (), []), ("pgd(eps=0)", (), []),
    ("pgd square(norm=l2,eps=0.5)", (), ["square-300 linf 0.1"]), ("fog pgd(norm=l2,eps=0.5) fgsm", (), [
        "square-300 l2 0.5", "square-300 linf 0.1"]), ("normalized", (), []),
    ("pgd", ("routed",), ["square-300 linf 0.1", "soft-20 linf 0.1"]),
    ("pgd adaptive", ("routed",), ["square-300 linf 0.1"])])
def test_what_is_added_to_a_suite(suite, surfaces, added):
    specs = black_box.checks(parse.attacks(suite, norm="linf", eps="0.1"), surfaces)
    assert [f"{spec.label} {spec.config.norm} {spec.config.eps}" for spec in specs] == added


def _found(broken_by, survivors_only=True):
    """Attempts on 100 images that broke the given numbers of those that the ones before left."""
    label = np.zeros(100, int)
    stands, attempts = 100, []
    for text, broken in broken_by:
        after = label.copy()
        after[stands - broken:stands] = 1
        [spec] = parse.attacks(text, norm="linf", eps="8/255")
        attacked = (np.arange(100) < stands) | (not survivors_only)
        attempts.append(verdicts.Attempt(spec, "none", attacked, {"label": after}, 0., {}))
        stands -= broken
    return verdicts.Found(np.arange(100), label, {"label": label}, tuple(attempts))


@pytest.mark.parametrize("broken_by, survivors_only, flagged", [
    ([("apgd", 40), ("square", 1)], True, True), ([("apgd", 40), ("square", 0)], True, False),
    ([("apgd", 40), ("fab", 9), ("rays", 1)], True, True), ([("square", 30)], True, False),
    ([("square", 30), ("apgd", 5)], True, False), ([("square", 30), ("apgd", 5)], False, True),
    ([("apgd", 40), ("square(norm=l2,eps=0.5)", 9)], True, False), ([("apgd", 40), ("square(eps=1)", 9)], True, False),
    ([("apgd", 40), ("fog", 9)], True, False), ([("fog", 40), ("square", 9)], True, False)])
def test_black_box_attacks_must_not_win(broken_by, survivors_only, flagged):
    assert bool(flags.of_attempts(_found(broken_by, survivors_only))) == flagged
