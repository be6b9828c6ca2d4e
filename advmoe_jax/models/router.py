"""Routers: what scores the experts. float32 whatever the backbone computes in.

B batch, L routed choices, E experts, C channels.
A router module has `scores_image(x, train) -> (B, L, E)` (asked once, before the backbone) or
`scores_layer(layer, features, train) -> (B, E)` (asked by every routed layer), and `layers` for counting.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from advmoe_jax.core.layers import LayerSpec
from advmoe_jax.models.layers import BatchNorm, Conv, global_average_pool

ROUTINGS = ("layer", "embedding", "global")


def make(cfg, routed_inputs: tuple[int, ...]) -> nn.Module:
    """Builds the router that `config.model.routing` names.

    Args:
        cfg: fields routing, router_width, num_experts.
        routed_inputs: input channels of each routed layer.
    """
    if cfg.routing == "layer":
        return LayerRouter(cfg.num_experts, len(routed_inputs), cfg.router_width)
    if cfg.routing == "embedding":
        return EmbeddingRouter(cfg.num_experts, len(routed_inputs), cfg.router_width)
    return GlobalRouter(cfg.num_experts, cfg.router_width)


def layers(cfg, routed_inputs: tuple[int, ...], image_shape: tuple[int, int, int]) -> tuple[LayerSpec, ...]:
    """Every convolution and linear layer of the router, for counting and import."""
    if cfg.routing == "layer":
        return tuple(
            spec for i, channels in enumerate(routed_inputs)
            for spec in _head_specs(f"layer{i}", channels, cfg.router_width, cfg.num_experts))
    if cfg.routing == "embedding":
        return _embedding_specs(cfg, len(routed_inputs), image_shape)
    return _global_specs(cfg, image_shape)


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
    """A router in every routed layer, on the global average pool of the layer's input.

    The AdvMoE paper has one in every MoE layer and does not publish its architecture.
    """

    num_experts: int
    num_layers: int
    hidden: int

    def setup(self):
        self.heads = [Head(self.num_experts, self.hidden, name=f"layer{i}") for i in range(self.num_layers)]

    def scores_layer(self, layer: int, features: jax.Array, train: int) -> jax.Array:
        """(B, H, W, C) input of the layer -> (B, E)."""
        return self.heads[layer](global_average_pool(features), train)


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


def _spec(path, kernel, stride, size, norm=None, torch_name=""):
    return LayerSpec(f"router/{path}", kernel, kernel[-1], stride, size, norm and f"router/{norm}", (), torch_name)


def _head_specs(name, channels, hidden, outputs):
    return (_spec(f"{name}/hidden", (channels, hidden), 1, (1, 1)),
            _spec(f"{name}/scores", (hidden, outputs), 1, (1, 1)))


def _embedding_specs(cfg, num_layers, image_shape):
    (height, width, channels), specs = image_shape, []
    for i in range(2):
        height, width, features = (height + 1) // 2, (width + 1) // 2, cfg.router_width * 2**i
        specs.append(_spec(f"conv{i + 1}", (3, 3, channels, features), 2, (height, width), f"bn{i + 1}"))
        channels = features
    return (*specs, *_head_specs("head", channels, 4 * cfg.router_width, num_layers * cfg.num_experts))


def _global_specs(cfg, image_shape):
    (height, width, channels), base = image_shape, cfg.router_width
    specs = [_spec("conv1", (3, 3, channels, base), 1, (height, width), "bn1", "conv1")]
    channels = base
    for stage in range(3):
        features = base * 2**stage
        for i in range(3):
            stride, name = (2 if stage and not i else 1), f"layer{stage + 1}_{i}"
            height, width = -(-height // stride), -(-width // stride)
            for j, (incoming, step) in enumerate(((channels, stride), (features, 1)), start=1):
                specs.append(_spec(f"{name}_conv{j}", (3, 3, incoming, features), step, (height, width),
                                   f"{name}_bn{j}", f"layer{stage + 1}.{i}.conv{j}"))
            channels = features
    return (*specs, _spec("fc", (channels, cfg.num_experts), 1, (1, 1), None, "fc"))
