"""Top-1 routing: which expert an image takes, and what gradient its router sees.

An image makes a choice in every routed layer; where a layer chooses for tokens, one for each of its T tokens, and the
L routed choices of the image are those of the first layer, then those of the second.

B batch, L routed choices, T tokens, E experts, C stored channels, w channels of an expert.
Source: Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks", ICCV 2023.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import one_of
from advmoe_jax.ops import losses

ROUTER_GRADS = ("none", "ste_full", "ste_selected", "scaled")
VIEWS = ("none", "ste_selected", "ste_full")
"""Gradients through which an honest evaluation attacks; the last one sees all experts."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("temperature", "ids"), meta_fields=("kind", "grad", "detach"))
@dataclasses.dataclass(frozen=True)
class Route:
    """How choices are made. Build one with `hard`, `soft` or `fixed`.

    Attributes:
        kind: "hard" (argmax), "soft" (softmax mixture) or "fixed" (given choices).
        grad: gradient of a hard choice to the scores, one of ROUTER_GRADS.
        detach: whether a router inside the network treats the features it reads as constants.
        temperature: of a soft choice.
        ids: (B,) or (B, L) given choices.
    """

    kind: str
    grad: str = "none"
    detach: bool = False
    temperature: jax.Array | None = None
    ids: jax.Array | None = None

    @property
    def counterfactual(self) -> bool:
        """Whether the scores of experts that were not chosen get a gradient, for which those must be computed."""
        return self.grad == "ste_full"


def hard(grad: str = "none", detach: bool = False) -> Route:
    """Argmax routing, what users get; `grad` changes its gradient and never its value.

    Experts whose output has its share in the softmax of the scores as a factor (`Choice.shares`) have it in y_e: the
    share itself is differentiated whatever `grad` is, so that "none" is the gradient of the function as it is.

    Args:
        grad: with y_e the output of expert e, s its score and g the cotangent of the layer's output,
            "none": the choice is a constant;
            "ste_full": d/ds_e = <g, y_e> for every expert;
            "ste_selected": the same for the chosen expert, 0 for the others (the released AdvMoE code);
            "scaled": gradient of y scaled by p / stop_gradient(p), p the softmax of the chosen expert.
        detach: for loss passes. The straight-through gradient then reaches a router's own parameters and not the
            backbone below it nor the routers of earlier layers: it is biased, and a chain of such terms through
            the layers drowns the true gradient.
    """
    return Route("hard", one_of("router gradient", grad, ROUTER_GRADS), detach)


def soft(temperature: float | jax.Array) -> Route:
    """Mixture of all experts with weights softmax(scores / temperature)."""
    return Route("soft", temperature=jnp.asarray(temperature, jnp.float32))


def fixed(ids: jax.Array) -> Route:
    """Given choices: (B,), the same in every layer and for every token, or (B, L)."""
    return Route("fixed", ids=ids)


def gates(scores: jax.Array, route: Route, layer: int) -> tuple[jax.Array, jax.Array]:
    """Weights of the experts in one layer.

    Ties go to the lowest index, NaN to its own index.

    Args:
        scores: (B, E) router logits, or (B, T, E) of tokens.
        route: how to choose.
        layer: index of the layer among those that choose.
    Returns:
        gate: as `scores`, exactly one-hot in value for "hard" and "fixed".
        ids: (B,) or (B, T) int32 of the expert with the largest weight.
    """
    num_experts = scores.shape[-1]
    if route.kind == "soft":
        gate = jax.nn.softmax(scores / route.temperature)
        return gate, jnp.argmax(scores, -1).astype(jnp.int32)
    if route.kind == "fixed":
        ids = _given(route.ids, layer, scores.shape[:-1]).astype(jnp.int32)
        return jax.nn.one_hot(ids, num_experts, dtype=scores.dtype), ids
    ids = jnp.argmax(scores, -1).astype(jnp.int32)
    choice = jax.nn.one_hot(ids, num_experts, dtype=scores.dtype)
    if route.grad == "ste_full":
        return choice + _zero(scores), ids
    if route.grad == "ste_selected":
        return choice * (1 + _zero(scores)), ids
    if route.grad == "scaled":
        return choice * (1 + _zero(jax.nn.log_softmax(scores))), ids
    return choice, ids


def _given(ids: jax.Array, layer: int, shape: tuple[int, ...]) -> jax.Array:
    """The choices (B,) or (B, L) in one layer, in the shape (B,) or (B, T)."""
    tokens = math.prod(shape[1:])
    ids = ids[:, None] if ids.ndim == 1 else ids[:, layer * tokens:(layer + 1) * tokens]
    return jnp.broadcast_to(ids, (shape[0], tokens)).reshape(shape)


def _zero(scores: jax.Array) -> jax.Array:
    """0 in value, also where a score is not finite, with the gradient of the scores."""
    return jnp.where(jnp.isfinite(scores), scores - jax.lax.stop_gradient(scores), 0)


def offsets(num_experts: int, width: int, channels: int, experts: str) -> tuple[int, ...]:
    """First stored channel of each expert.

    Args:
        num_experts: E.
        width: w = floor(r * C).
        channels: C of the dense layer.
        experts: "disjoint" (E * w stored channels, the released code) or "shared" (C stored channels in windows
            of least, uniform overlap, the paper). The two are the same where E * w = C.
    """
    if num_experts == 1:
        return (0,)
    if experts == "disjoint":
        return tuple(e * width for e in range(num_experts))
    return tuple(int(e * (channels - width) / (num_experts - 1) + 0.5) for e in range(num_experts))


def mix(y: jax.Array, gate: jax.Array, starts: tuple[int, ...], width: int) -> jax.Array:
    """Takes each image's channels out of the outputs of all experts.

    Args:
        y: (B, H, W, C) stored channels.
        gate: (B, E).
        starts: first channel of each expert.
        width: w.
    Returns:
        (B, H, W, w).
    """
    gate = gate.astype(y.dtype)
    return sum(gate[:, e, None, None, None] * y[..., start:start + width] for e, start in enumerate(starts))


def other_choice(scores: jax.Array, ids: jax.Array) -> jax.Array:
    """How far the best other score is above that of a choice, mean over the layers.

    Args:
        scores: (B, L, E) router logits.
        ids: (B, L) choices.
    Returns:
        (B,), negative where no layer would choose otherwise.
    """
    flat = losses.margin(scores.reshape(-1, scores.shape[-1]), ids.reshape(-1))
    return jnp.mean(flat.reshape(scores.shape[:2]), -1)


def by_layer(choices: Any, tokens: int) -> Any:
    """What is known of choices, (B, layers * T, ...), with a row for each token, (B * T, layers, ...)."""
    parts = choices.reshape(len(choices), -1, tokens, *choices.shape[2:])
    return parts.swapaxes(1, 2).reshape(-1, parts.shape[1], *choices.shape[2:])


def load(ids: jax.Array, num_experts: int, mask: jax.Array | None = None) -> jax.Array:
    """Images each expert got, per choice.

    Args:
        ids: (B, L).
        num_experts: E.
        mask: (B,) bool, which images count.
    Returns:
        (L, E) float32 counts.
    """
    choice = jax.nn.one_hot(ids, num_experts)
    if mask is not None:
        choice = choice * mask[:, None, None]
    return choice.sum(0)


def load_entropy(counts: jax.Array) -> jax.Array:
    """Entropy of the load over log E: 1 is perfectly even, 0 is one expert for all.

    Args:
        counts: (..., E) images per expert.
    Returns:
        (...,) in [0, 1].
    """
    p = counts / jnp.maximum(counts.sum(-1, keepdims=True), 1)
    return -jnp.sum(jax.scipy.special.xlogy(p, p), -1) / jnp.log(counts.shape[-1])


def balance_loss(scores: jax.Array, tokens: int = 1) -> jax.Array:
    """Load-balance loss of Fedus et al., "Switch Transformers", 2022, eq. 4: 1 when even, E when collapsed.

    Args:
        scores: (B, L, E) router logits.
        tokens: T, of which an image makes a choice each in one layer, all under one load.
    Returns:
        Scalar, mean over the layers.
    """
    scores, num_experts = by_layer(scores, tokens), scores.shape[-1]
    fraction = jax.nn.one_hot(jnp.argmax(scores, -1), num_experts).mean(0)
    return num_experts * jnp.mean(jnp.sum(fraction * jax.nn.softmax(scores).mean(0), -1))
