"""Attacks of this package against those of other libraries, on the same small network with the same weights.

The network is that of bench.cnn with random weights, on 32x32x3 images. Libraries that are not installed are left out:
`pip install advmoe_jax[oracle]` and `pip install --no-deps torchattacks`.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import pgd
from advmoe_jax.bench import cnn
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.evaluation import autoattack

_BATCH, _STEPS, _EXAMPLES = 64, 50, 128
_EPS, _STEP_SIZE = 8 / 255, 2 / 255
_BATCHES = (32, 128)  # for AutoAttack


def _model(apply, weights) -> jax.tree_util.Partial:
    return jax.tree_util.Partial(apply, jax.tree.map(jnp.asarray, weights))


def _images(count):
    return np.random.default_rng(1).uniform(0, 1, (count, 32, 32, 3)).astype(np.float32)


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each contender: milliseconds, and those of our first one over them.

    For AutoAttack also the robust accuracy, and how many rows went through the network, forward and backward: those
    that needed it, and with fillers.
    """
    contenders, counts = _autoattack()
    return _rows(f"PGD-{_STEPS} linf, batch {_BATCH}", "auto, patches", _pgd(), {}, rounds) + _rows(
        f"AutoAttack linf, {_EXAMPLES} images", f"ours, batch {_BATCHES[0]}", contenders, counts, max(rounds // 2, 1))


def _rows(what, ours, contenders, counts, rounds):
    ms = interleaved(contenders, (), rounds)
    columns = ("robust %", "rows forward", "rows backward", "executed")
    return [{"what": what, "contender": name, "ms": value, "ours / this": ms[ours] / value,
             **dict(zip(columns, counts.get(name, ("",) * 4)))} for name, value in ms.items()]


def _pgd() -> dict[str, Callable[[], Any]]:
    weights, x = cnn.init(0), _images(_BATCH)
    y = np.asarray(jnp.argmax(_model(cnn.apply, weights)(x), -1), np.int32)
    found = {}
    for form, apply in (("patches", cnn.apply_patches), ("convolutions", cnn.apply)):
        for driver in ("auto", "host", "device"):
            attack = pgd.make(pgd.Config(eps=_EPS, step_size=_STEP_SIZE, num_steps=_STEPS, driver=driver))
            found[f"{driver}, {form}"] = functools.partial(
                attack, _model(apply, weights), jax.random.key(0), jnp.asarray(x), jnp.asarray(y))
        if _installed("foolbox"):
            found[f"foolbox on JAX, {form}"] = _foolbox(_model(apply, weights), x, y)
    if _installed("torchattacks"):
        found["torchattacks"] = _torchattacks(weights, x, y)
    return found


def _torchattacks(weights, x, y):
    import torch
    import torchattacks

    attack = torchattacks.PGD(cnn.in_torch(weights), eps=_EPS, alpha=_STEP_SIZE, steps=_STEPS, random_start=True)
    images, labels = cnn.to_torch(x), torch.tensor(y).long()
    return lambda: attack(images, labels)


def _foolbox(model, x, y):
    import eagerpy
    import foolbox

    model = foolbox.JAXModel(jax.jit(model), bounds=(0, 1), data_format="channels_last")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=_STEP_SIZE, steps=_STEPS, random_start=False)
    images, labels = eagerpy.astensor(jnp.asarray(x)), eagerpy.astensor(jnp.asarray(y))
    return lambda: attack(model, images, labels, epsilons=_EPS)[1].raw


def _autoattack() -> tuple[dict[str, Callable[[], Any]], dict[str, tuple]]:
    """The contenders, and of each the robust accuracy and the rows that it sends through the network."""
    weights, x = cnn.init(0), _images(_EXAMPLES)
    y = np.asarray(jnp.argmax(_model(cnn.apply, weights)(x), -1), np.int32)
    arguments = _model(cnn.apply_patches, weights), x, y, 5 / 255  # which some of the images stand
    sides = {name: functools.partial(_ours, arguments, suite)
             for name, suite in (("ours", "standard"), ("ours, fast", "fast"))}
    if _installed("pyautoattack"):
        sides["pyautoattack"] = functools.partial(_pyautoattack, weights, *arguments[1:])
    found, counts = {}, {}
    for name, side in sides.items():
        for batch_size in _BATCHES:
            contender = f"{name}, batch {batch_size}"
            found[contender], counts[contender] = side(batch_size)
    return found, counts


def _ours(arguments, suite, batch_size):
    report = autoattack.run_report(*arguments, suite=suite, batch_size=batch_size)
    forward, backward, *executed = (
        sum(attempt.passes[name] for attempt in report.found.attempts)
        for name in ("forward", "backward", "executed_forward", "executed_backward"))
    return (functools.partial(autoattack.run, *arguments, suite=suite, batch_size=batch_size),
            (100 * report.robust_accuracy, forward, backward, sum(executed)))


def _pyautoattack(weights, x, y, eps, batch_size):
    import pyautoattack
    import torch

    model, rows = cnn.in_torch(weights), {"forward": 0, "backward": 0}

    def count(_, inputs, output):
        rows["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda grad: rows.update(backward=rows["backward"] + len(grad)))

    hook = model.register_forward_hook(count)
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, version="standard", seed=0, device="cpu")
    images, labels = cnn.to_torch(x), torch.tensor(y).long()

    def run():
        return attack.run_standard_evaluation(images, labels, batch_size=batch_size)

    x_adv, *_ = run()
    robust = (model(x_adv).argmax(1) == labels).float().mean().item()
    counted = 100 * robust, rows["forward"], rows["backward"], rows["forward"] + rows["backward"]
    hook.remove()
    return run, counted


def _installed(name):
    return importlib.util.find_spec(name) is not None
