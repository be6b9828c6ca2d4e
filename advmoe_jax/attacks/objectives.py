"""What an attack increases, and when it has won. B batch, K classes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import one_of
from advmoe_jax.ops import losses


@dataclasses.dataclass(frozen=True)
class Objective:
    """A pair of functions of (outputs, y); y is what the attack was given beside the images.

    Attributes:
        loss: value per example (B,) that the attack increases.
        success: (B,) bool, whether the example is broken. A broken iterate beats every other one.
    """

    loss: Callable[[Any, Any], jax.Array]
    success: Callable[[Any, Any], jax.Array]


def misclassified(logits: jax.Array, y: jax.Array) -> jax.Array:
    """(B, K), (B,) labels -> (B,) bool. A NaN logit counts as misclassified."""
    return (jnp.argmax(logits, -1) != y) | jnp.any(jnp.isnan(logits), -1)


def _kl(logits: jax.Array, clean_logits: jax.Array) -> jax.Array:
    return losses.kl(clean_logits, logits)


def _never(logits: jax.Array, _) -> jax.Array:
    return jnp.zeros(logits.shape[0], bool)


NAMED = {
    "ce": Objective(losses.cross_entropy, misclassified),
    "margin": Objective(losses.margin, misclassified),
    "kl": Objective(_kl, _never),
}
"""By name: cross-entropy and margin take labels (B,), kl the logits (B, K) of the clean images (TRADES)."""


def get(objective: str | Objective) -> Objective:
    """The objective of that name, or the one given."""
    if isinstance(objective, Objective):
        return objective
    return NAMED[one_of("attack loss", objective, NAMED)]


def logits_fn(outputs_fn: Callable) -> jax.tree_util.Partial:
    """`x -> logits` of a model `x -> (logits, aux)`, with its weights still arguments of a traced program."""
    return jax.tree_util.Partial(_first, outputs_fn)


def _first(outputs_fn, x):
    return outputs_fn(x)[0]
