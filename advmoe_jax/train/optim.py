"""Optimizers and schedules of one parameter group."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import optax

from advmoe_jax.core import units
from advmoe_jax.core.errors import one_of

SCHEDULES = ("cosine", "cosine_epoch", "constant")


def schedule(cfg, steps_per_epoch: int, total_steps: int) -> Callable:
    """Learning rate as a function of the step.

    Args:
        cfg: fields learning_rate, schedule, warmup. "cosine" goes from the learning rate to 0, step by step.
            "cosine_epoch" is the released AdvMoE code's: lr / 2 * (1 + cos(pi * (e - 1) / E)) in epoch e = 0, 1, ...
            of E. `warmup` is a length over which either starts linearly from 0.
    """
    one_of("optim schedule", cfg.schedule, SCHEDULES)
    epochs = max(1, round(total_steps / steps_per_epoch))

    def base(step):
        if cfg.schedule == "cosine":
            return 0.5 * cfg.learning_rate * (1 + jnp.cos(jnp.pi * step / max(total_steps, 1)))
        if cfg.schedule == "cosine_epoch":
            return 0.5 * cfg.learning_rate * (1 + jnp.cos(math.pi * (step // steps_per_epoch - 1) / epochs))
        return jnp.full((), cfg.learning_rate)

    warmup = units.steps(cfg.warmup, steps_per_epoch, total_steps, "optim warmup")
    return lambda step: base(step) * (jnp.minimum(1, (step + 1) / warmup) if warmup else 1)


def make(cfg, steps_per_epoch: int, total_steps: int, every: int = 1) -> optax.GradientTransformation:
    """SGD with momentum and coupled weight decay on all parameters, as PyTorch's.

    Args:
        cfg: fields learning_rate, momentum, weight_decay, schedule, warmup, and clip_norm, the largest global
            gradient norm (0 for no clipping).
        steps_per_epoch, total_steps: of training.
        every: in which of its steps parameters are updated: every one, every second, ...
    """
    rate = schedule(cfg, steps_per_epoch, total_steps)
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm > 0 else optax.identity(),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.trace(cfg.momentum),
        optax.scale_by_learning_rate(lambda count: rate(every * count)))
