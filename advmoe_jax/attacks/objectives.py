"""What an attack increases, and when it has won. B batch, K classes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver
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


def _misclassified_first(logits: jax.Array, y: tuple[jax.Array, jax.Array]) -> jax.Array:
    return misclassified(logits, y[0])


NAMED = {
    "ce": Objective(losses.cross_entropy, misclassified),
    "margin": Objective(losses.margin, misclassified),
    "dlr": Objective(losses.dlr, misclassified),
    "kl": Objective(_kl, _never),
}
"""By name; they take labels (B,), but for kl, which takes the logits (B, K) of the clean images (TRADES)."""

TARGETED = {
    "ce": Objective(lambda logits, y: -losses.cross_entropy(logits, y[1]), _misclassified_first),
    "margin": Objective(lambda logits, y: losses.margin_to(logits, *y), _misclassified_first),
    "dlr": Objective(lambda logits, y: losses.dlr_targeted(logits, *y), _misclassified_first),
}
"""By name; they take (labels, targets), (B,) each. Success is any misclassification."""


def get(objective: str | Objective) -> Objective:
    """The objective of that name, or the one given."""
    if isinstance(objective, Objective):
        return objective
    return NAMED[one_of("attack loss", objective, NAMED)]


def partial(function: Callable) -> jax.tree_util.Partial:
    """A model as attacks take it. A plain closure works, but its weights are constants and each one compiles anew."""
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)


def logits_fn(outputs_fn: Callable) -> jax.tree_util.Partial:
    """`x -> logits` of a model `x -> (logits, aux)`, with its weights still arguments of a traced program."""
    return jax.tree_util.Partial(_first, outputs_fn)


def _first(outputs_fn, *inputs):
    return outputs_fn(*inputs)[0]


def clean(logits_fn: jax.tree_util.Partial, rows: dict[str, Any], targets: int, noisy: bool = False
          ) -> tuple[dict[str, jax.Array], jax.Array]:
    """One pass over the clean images.

    Args:
        logits_fn: the model.
        rows: {"keys", "x", "y"} of the images.
        targets: how many classes to rank.
        noisy: whether `logits_fn` takes keys too.
    Returns:
        A driver's candidate, broken where the image is misclassified already; and (B, min(targets, K - 1)) the
        classes other than the label by falling logit.
    """
    driver.count((1, 0), rows["x"].shape[0])
    return _clean(logits_fn, rows, targets, noisy)


@functools.partial(jax.jit, static_argnames=("targets", "noisy"))
def _clean(logits_fn, rows, targets, noisy):
    x, y = rows["x"], rows["y"]
    logits = logits_fn(x, rows["keys"]) if noisy else logits_fn(x)
    ranking = jax.lax.top_k(losses.others(logits, y), min(targets, logits.shape[-1] - 1))[1]
    return driver.none_yet(x, misclassified(logits, y)), ranking
