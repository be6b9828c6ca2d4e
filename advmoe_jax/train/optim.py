"""Optimizers and schedules of one parameter group."""

import dataclasses
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax

from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.core.fields import Only, group, setting
from advmoe_jax.models.network import HAS_ROUTER

OPTIMIZERS = ("sgd", "adam", "adamw")
_MOST_FACTOR = 10**6
SCHEDULES = ("cosine", "cosine_epoch", "constant", "multistep", "piecewise")

_EXAMPLES = {"multistep": "multistep(50%:0.1,75%:0.1)", "piecewise": "piecewise(0:0,40%:1,100%:0)"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.optim.GROUP`."""

    optimizer: str = setting("sgd", "sgd with momentum and coupled weight decay as PyTorch's, adam, or adamw",
                             choices=OPTIMIZERS)
    learning_rate: float = setting(0.1, "the largest", least=0, most=1e4)
    momentum: float = setting(0.9, "of sgd; of the others the decay of the mean", least=0, most=1)
    weight_decay: float = setting(5e-4, "on all parameters", least=0, most=1e4)
    schedule: str = setting("cosine", "cosine, cosine_epoch, constant, multistep(50%:0.1,75%:0.1) or "
                                      "piecewise(0:0,40%:1,100%:0)")
    warmup: str = setting("0%", "length over which the rate starts linearly", read=units.length)
    clip_norm: float = setting(0.0, "largest global norm of the gradients; 0 for no clipping", least=0, most=1e9)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Fields of `config.optim`: a model says which of its parameter groups takes which."""

    backbone: Config = group(Config(), Only("systems that train the backbone", lambda config: (
        config.system.get("trains") != "router")))
    router: Config = group(Config(learning_rate=0.01, warmup="5%", clip_norm=1.0), Only(
        f"systems that train a router, of {HAS_ROUTER.when}", lambda config: (
            HAS_ROUTER.holds(config) and config.system.get("trains") != "backbone")))


def schedule(cfg, steps_per_epoch: int, total_steps: int) -> Callable:
    """Learning rate as a function of the step.

    Args:
        cfg: fields learning_rate; schedule; and warmup, a length over which any schedule is multiplied by a ramp from
            0 to 1. Schedules are

            - "cosine": from the learning rate to 0, step by step.
            - "cosine_epoch": the released AdvMoE code's, lr / 2 * (1 + cos(pi * (e - 1) / E)) in epoch e = 0, 1, ...
              of E.
            - "constant".
            - "multistep(50%:0.1,75%:0.1)": multiplied by each factor from its length on.
            - "piecewise(0:0,40%:1,100%:0)": linear between knots, which are factors of the learning rate, and level
              before the first and after the last; of two knots at one step the second counts.

            Lengths are as `core.units.steps` reads them, in steps, epochs or percent of the training.
        steps_per_epoch, total_steps: of training.
    Raises:
        UserError: the schedule or the warm-up cannot be read, or the warm-up is longer than the training.
    """
    base = _base(cfg, steps_per_epoch, total_steps)
    warmup = units.steps(cfg.warmup, steps_per_epoch, total_steps, "optim warmup")
    if warmup > total_steps:
        raise UserError(f"optim warmup is {cfg.warmup!r}, {warmup} steps: expected at most the {total_steps} of "
                        "training")
    return lambda step: base(step) * (jnp.minimum(1, (step + 1) / warmup) if warmup else 1)


def _base(cfg, steps_per_epoch: int, total_steps: int) -> Callable:
    name, knots = _read(cfg.schedule, steps_per_epoch, total_steps)
    rate = cfg.learning_rate
    if name == "cosine":
        return optax.cosine_decay_schedule(rate, max(total_steps, 1))
    if name == "cosine_epoch":
        decay = optax.cosine_decay_schedule(rate, max(1, round(total_steps / steps_per_epoch)))
        return lambda step: decay(step // steps_per_epoch - 1)
    if name == "multistep":
        scales = {}
        for step, factor in knots:  # two lengths can be the same step of a short training
            scales[step] = scales.get(step, 1) * factor
        return optax.piecewise_constant_schedule(rate, scales)
    if name == "piecewise":
        # Optax interpolates between products of factors, of which none could follow a 0. The last knot is there twice
        # since jnp.interp takes the first of two at the end, and else the second.
        steps, factors = np.asarray([*knots, (knots[-1][0] + 1, knots[-1][1])], np.float32).T
        return lambda step: rate * jnp.interp(step, steps, factors)
    return optax.constant_schedule(rate)


def _read(text: str, steps_per_epoch: int, total_steps: int) -> tuple[str, list[tuple[int, float]]]:
    """A schedule's name, and its lengths in steps with their factors."""
    name, rest = re.fullmatch(r"\s*(\w*)(.*)", text, re.DOTALL).groups()
    one_of("optim schedule", name if name in SCHEDULES or rest.startswith("(") else text, SCHEDULES)
    if name not in _EXAMPLES:
        if rest.strip():
            raise UserError(f"optim schedule is {text!r}: expected {name!r} alone")
        return name, []
    try:
        pairs = [pair.split(":") for pair in re.fullmatch(r"\((.*)\)\s*", rest, re.DOTALL)[1].split(",")]
        knots = [(units.steps(at, steps_per_epoch, total_steps), units.number(factor)) for at, factor in pairs]
        is_rising = knots == sorted(knots, key=lambda knot: knot[0])
        if not is_rising or any(not 0 <= factor <= _MOST_FACTOR for _, factor in knots):
            raise ValueError
    except (UserError, TypeError, ValueError):
        raise UserError(f"optim schedule is {text!r}: expected rising lengths, each with a factor of the learning rate "
                        f"from 0 to {_MOST_FACTOR}, such as {_EXAMPLES[name]!r}") from None
    return name, knots


def make(cfg, steps_per_epoch: int, total_steps: int, every: int = 1) -> optax.GradientTransformation:
    """The optimizer of a group. All decay all parameters.

    Args:
        cfg: fields of `schedule`, and

            - optimizer: "sgd" with momentum and coupled weight decay, or "adam" with coupled weight decay, both as
              PyTorch's; or "adamw" with decoupled weight decay (Loshchilov & Hutter, ICLR 2019). "sgd" if there is no
              such field.
            - momentum: 0 to 1; of Adam it is b1, less than 1 (b2 is 0.999, epsilon 1e-8).
            - weight_decay.
            - clip_norm: the largest global gradient norm, 0 for no clipping. Weight decay is not clipped.
        steps_per_epoch, total_steps: of training.
        every: in which of its steps parameters are updated: every one, every second, ...
    Raises:
        UserError: a field cannot be read.
    """
    name = one_of("optim optimizer", cfg.optimizer, OPTIMIZERS)
    if name != "sgd" and not 0 <= cfg.momentum < 1:
        raise UserError(f"optim momentum is {cfg.momentum}: expected 0 or more and less than 1 for {name}, such as 0.9")
    rate = schedule(cfg, steps_per_epoch, total_steps)
    decay = optax.add_decayed_weights(cfg.weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm > 0 else optax.identity(),
        *{"sgd": lambda: (decay, optax.trace(cfg.momentum)),
          "adam": lambda: (decay, optax.scale_by_adam(cfg.momentum)),
          "adamw": lambda: (optax.scale_by_adam(cfg.momentum), decay)}[name](),
        optax.scale_by_learning_rate(lambda count: rate(every * count)))
