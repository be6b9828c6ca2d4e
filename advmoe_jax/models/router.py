"""Routers: what scores the experts. float32 whatever the backbone computes in.

B batch, L routed layers, T tokens, E experts, C channels.
A router module has `scores_image(x, train) -> (B, L, E)` (asked once, before the backbone) or
`scores_layer(layer, features, train) -> (B, E)`, of tokens (B, T, E) (asked by every routed layer).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from advmoe_jax.models.layers import BatchNorm, Conv, global_average_pool

ROUTINGS = ("layer", "embedding", "global")


def make(cfg, num_layers: Callable[[], int]) -> nn.Module:
    """Builds the router that `config.model.routing` names.

    Args:
        cfg: fields routing, router_width, num_experts.
        num_layers: counts the choices of an image; asked by the router that scores them all at once.
    """
    if cfg.routing == "layer":
        return LayerRouter(cfg.num_experts, cfg.router_width)
    if cfg.routing == "embedding":
        return EmbeddingRouter(cfg.num_experts, num_layers(), cfg.router_width)
    return GlobalRouter(cfg.num_experts, cfg.router_width)


class Head(nn.Module):
    """Pooled features to scores: BatchNorm, linear, tanh, linear.

    The mean over images dominates pooled features after a ReLU; without the BatchNorm nearly all images would
    start with the same expert. tanh, being odd, keeps the scores centred.
    """

    num_experts: int
    hidden: int

    @nn.compact
    def __call__(self, features: jax.Array, train: int) -> jax.Array:
        """(B, C) -> (B, E)."""
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        h = BatchNorm(is_affine=False, name="bn")(features, train)
        h = jnp.tanh(nn.Dense(self.hidden, name="hidden")(h))
        return nn.Dense(self.num_experts, name="scores")(h)


class LayerRouter(nn.Module):
    """A router in every routed layer: on the global average pool of the layer's input, or on each of its tokens.

    The AdvMoE paper has one in every MoE layer and does not publish its architecture. That of tokens is V-MoE's
    (Riquelme et al., NeurIPS 2021), linear.
    """

    num_experts: int
    hidden: int

    @nn.compact
    def scores_layer(self, layer: int, features: jax.Array, train: int) -> jax.Array:
        """(B, H, W, C) input of the layer -> (B, E); (B, T, C) tokens -> (B, T, E)."""
        if features.ndim == 3:
            return nn.Dense(self.num_experts, use_bias=False, name=f"layer{layer}")(features)
        return Head(self.num_experts, self.hidden, name=f"layer{layer}")(global_average_pool(features), train)


class EmbeddingRouter(nn.Module):
    """One shallow network on the image, and a linear head for every routed layer."""

    num_experts: int
    num_layers: int
    width: int

    def setup(self):
        self.convs = [Conv(self.width * 2**i, 3, 2, name=f"conv{i + 1}") for i in range(2)]
        self.norms = [BatchNorm(name=f"bn{i + 1}") for i in range(2)]
        self.head = Head(self.num_experts * self.num_layers, 4 * self.width)

    def scores_image(self, x: jax.Array, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, L, E)."""
        for conv, norm in zip(self.convs, self.norms):
            x = nn.relu(norm(conv(x), train))
        return self.head(global_average_pool(x), train).reshape(-1, self.num_layers, self.num_experts)


class GlobalRouter(nn.Module):
    """One choice for all layers, by a CIFAR ResNet-20 on the image: the router of the released AdvMoE code.

    Three stages of three blocks; shortcuts take every second pixel and pad channels with zeros.
    """

    num_experts: int
    width: int

    @nn.compact
    def scores_image(self, x: jax.Array, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, 1, E)."""

        def norm(x, name):
            return BatchNorm(name=name)(x, train)

        x = nn.relu(norm(Conv(self.width, name="conv1")(x), "bn1"))
        for stage in range(3):
            features = self.width * 2**stage
            for i in range(3):
                stride, name = (2 if stage and not i else 1), f"layer{stage + 1}_{i}"
                y = nn.relu(norm(Conv(features, 3, stride, name=f"{name}_conv1")(x), f"{name}_bn1"))
                y = norm(Conv(features, name=f"{name}_conv2")(y), f"{name}_bn2")
                missing = features - x.shape[-1]
                x = jnp.pad(x[:, ::stride, ::stride],
                            ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
                x = nn.relu(x + y)
        return nn.Dense(self.num_experts, name="fc")(global_average_pool(x))[:, None]
