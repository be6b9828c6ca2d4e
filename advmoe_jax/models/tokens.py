"""Layers of networks on tokens, such as patches of an image: patch embedding, attention, MLPs and experts of them.

B batch, T tokens, I input, C channels of a token, O output, E experts, w expert width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from advmoe_jax.models.layers import Choose, Experts
from advmoe_jax.ops import dispatch, routing
from advmoe_jax.ops.dispatch import Choice

truncated_normal = nn.initializers.truncated_normal(0.02)
"""The initialiser of DeiT's and timm's vision transformers."""


def linear(features: int, x: jax.Array, name: str) -> nn.Dense:
    """A linear layer with bias for x, in its type."""
    return nn.Dense(features, dtype=x.dtype, kernel_init=truncated_normal, name=name)


def norm(x: jax.Array, name: str) -> nn.LayerNorm:
    """A LayerNorm for x as timm sets it, in its type; its statistics are float32 at least."""
    return nn.LayerNorm(epsilon=1e-6, dtype=x.dtype, name=name)


class Patches(nn.Module):
    """A linear embedding of patches side by side: a convolution whose stride is its size, without padding.

    Attributes:
        features: C.
        size: pixels of a patch's side.
    """

    features: int
    size: int

    @property
    def stride(self) -> int:
        return self.size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, I) -> (B, H / size, W / size, C)."""
        (batch, height, width, channels), size = x.shape, self.size
        kernel = self.param("kernel", truncated_normal, (size, size, channels, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x = x.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
        x = x.reshape(batch, height // size, width // size, -1)
        return x @ kernel.astype(x.dtype).reshape(-1, self.features) + bias.astype(x.dtype)[None, None, None]


class Attention(nn.Module):
    """Multi-head self-attention, the softmax in float32 at least.

    Attributes:
        heads: which divide C among them.
    """

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, T, C) -> the same shape."""
        query, key, value = (linear(x.shape[-1], x, name)(x).reshape(*x.shape[:2], self.heads, -1)
                             for name in ("query", "key", "value"))
        y = nn.dot_product_attention(query, key, value, force_fp32_for_softmax=x.dtype.itemsize < 4)
        return linear(x.shape[-1], x, "proj")(y.reshape(x.shape))


class RoutedDense(nn.Module):
    """A linear layer with bias of E experts, of which each image or token takes one. Experts share nothing.

    Attributes:
        features: w.
        num_experts: E.
        expert_init: "equal" | "independent".
    """

    features: int
    num_experts: int
    expert_init: str

    def _init(self, key, shape, dtype=jnp.float32):
        if self.expert_init == "independent":
            return truncated_normal(key, shape, dtype)
        return jnp.tile(truncated_normal(key, (shape[0], self.features), dtype), (1, self.num_experts))

    @nn.compact
    def __call__(self, x: jax.Array, choice: Choice) -> jax.Array:
        """(B, T, I) -> (B, T, w). The choice has a plan or an expert."""
        stored = self.num_experts * self.features
        kernel = self.param("kernel", self._init, (x.shape[-1], stored), jnp.float32).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (stored,), jnp.float32).astype(x.dtype)
        starts = routing.offsets(self.num_experts, self.features, self.features, "disjoint")
        rows = x.reshape(choice.gate.shape[0], -1, 1, x.shape[-1])
        y = dispatch.conv(rows, kernel[None, None], choice, starts, self.features, 1)
        biases = bias.reshape(self.num_experts, 1, self.features)
        if choice.expert is not None:
            own = biases[choice.expert]
        else:
            own = sum(gate[:, None] * bias for gate, bias in zip(choice.gate.astype(x.dtype).T, biases))
        return (y + own[:, None, None]).reshape(*x.shape[:-1], self.features)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them; with several experts each is such an MLP, and its output has its
    share in the softmax of the scores as a factor. No token is dropped, whatever the load.

    Attributes:
        hidden: channels between the layers.
        experts: of the network.
        is_routed: whether it has several, where there are several.
    """

    hidden: int
    experts: Experts
    is_routed: bool

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose) -> jax.Array:
        """(B, T, C) -> the same shape."""
        def mlp(first, second, *choice):
            return second(nn.gelu(first(x, *choice), approximate=False), *choice)

        if not (self.is_routed and self.experts.are_several):
            return mlp(linear(self.hidden, x, "fc1"), linear(x.shape[-1], x, "fc2"))
        first, second = (RoutedDense(features, self.experts.num_experts, self.experts.expert_init, name=name)
                         for features, name in ((self.hidden, "fc1"), (x.shape[-1], "fc2")))
        return dispatch.experts(lambda choice: mlp(first, second, choice), choose(x))
