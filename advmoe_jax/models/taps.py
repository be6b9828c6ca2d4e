"""What the layers of a network read and give, kept while it is computed. B images."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

_HALF = 0.1  # the activation that counts as half of one


def active(function: Callable[[], Any]) -> tuple[Any, jax.Array, jax.Array]:
    """Runs a network of layers that read what ReLUs give, and says how much of that is not zero.

    Args:
        function: calls it, without `train.remat`, once or in several passes over B images each.
    Returns:
        What it gives; and of each pass and image, (P, B), the mean over the layers of a / (a + 0.1), a smooth count of
        activations a, and of the share that is above 0. The layer that reads the image is left out, and one that reads
        what another one has read.
    """
    found: list[list[jax.Array]] = []
    seen: list[Any] = []
    last = ""

    def watched(call, args, kwargs, context):
        nonlocal last
        module, path = context.module, "/".join(context.module.path)
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            if not found or path == last:  # the first layer again: another pass
                last = path
                found.append([])
            elif not any(args[0] is x for x in seen):
                seen.append(args[0])
                found[-1].append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(watched):
        result = function()
    smooth, share = (jnp.stack([jnp.stack([_mean(count(jax.nn.relu(a))) for a in of_pass]).mean(0)
                                for of_pass in found]) for count in (_smooth, lambda a: (a > 0).astype(a.dtype)))
    return result, smooth, share


def _smooth(a):
    return a / (a + _HALF)


def _mean(a):
    """(B, ...) -> (B,)."""
    return jnp.mean(a.astype(jnp.float32), tuple(range(1, a.ndim)))


def features(function: Callable[[], Any]) -> tuple[jax.Array, ...]:
    """What each norm gives, (B, ...), in the order of the calls, while a network is run on B images."""
    found = []

    def watched(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.has_variable("batch_stats", "mean"):
            found.append(y)
        return y

    with nn.intercept_methods(watched):
        function()
    return tuple(found)


def inputs(function: Callable[[], Any], path: str) -> tuple[Any, jax.Array]:
    """Runs a network and gives also what one layer reads.

    Args:
        function: calls it, without `train.remat`, once or in several passes over B images each.
        path: of the layer, which reads (B, ...).
    Returns:
        What it gives; and what the layer reads in each pass, (P, B, ...) float32.
    """
    found = []

    def watched(call, args, kwargs, context):
        if context.method_name == "__call__" and "/".join(context.module.path) == path:
            found.append(args[0].astype(jnp.float32))
        return call(*args, **kwargs)

    with nn.intercept_methods(watched):
        result = function()
    return result, jnp.stack(found)
