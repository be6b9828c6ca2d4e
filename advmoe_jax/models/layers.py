"""Layers that the backbones share. B batch, H W height and width, I input, O output, E experts, w expert width."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import batch_norm, conv, dispatch, gathered, routing
from advmoe_jax.ops.dispatch import Choice

# Kaiming normal, fan out: the initialiser of the released AdvMoE code's backbones. The fan of a routed kernel counts
# all stored channels, or those of one expert where experts start equal.
kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal", dtype=jnp.float32)

BLOCK = "block"  # name of what a block gives, `checkpoint_name(y, BLOCK)`: all that `train.remat` keeps

_MOMENTUM = 0.9  # what an update keeps of running statistics; PyTorch's 0.1
_ROUNDED = 10_000  # the least r that messages name is rounded up to a multiple of 1 / 10,000
_MOST_BLOCKS = 200  # of a stage: He's deepest network for CIFAR has so many

def _kernel(layer: nn.Module, x: jax.Array, init: Callable, shape: tuple[int, ...]) -> jax.Array:
    """The layer's kernel, in x's type where that has half the bits: it is stored and updated in float32."""
    kernel = layer.param("kernel", init, shape)
    return kernel.astype(x.dtype) if x.dtype.itemsize < 4 else kernel


Choose = Callable[[jax.Array], Choice]
"""Given the input of a routed layer, (B, H, W, I) or tokens (B, T, I), what its images or tokens take; called once a
layer, or once for an expert of several layers, in order."""


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch sets it, but that running variances are biased.

    Attributes:
        is_affine: whether it learns a scale and a bias.
    """

    is_affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: int) -> jax.Array:
        """(B, ..., C) -> the same shape.

        Args:
            x: of a batch.
            train: 0: by running statistics; else by those of the batch, which holds so many passes in turn, each with
                its own (`ops.batch_norm`); they update the running ones one after the other.
        """
        shape, stored = x.shape[-1:], (x.shape[-1:], jnp.float32)
        scale = self.param("scale", nn.initializers.ones, *stored) if self.is_affine else jnp.ones(shape, x.dtype)
        bias = self.param("bias", nn.initializers.zeros, *stored) if self.is_affine else jnp.zeros(shape, x.dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, *stored)
        var = self.variable("batch_stats", "var", jnp.ones, *stored)
        if not train:
            return batch_norm.scaled(x, mean.value, lax.rsqrt(var.value + batch_norm.EPSILON) * scale, bias)
        y, *found = batch_norm.normalize(x, scale, bias, int(train))
        if not self.is_initializing():
            for running, of_passes in zip((mean, var), found):
                for now in of_passes:
                    running.value = _MOMENTUM * running.value + (1 - _MOMENTUM) * now
        return y


class Conv(nn.Module):
    """Convolution, padding k // 2.

    Attributes:
        features: O.
        size: k.
        stride: in both directions.
        use_bias: whether a bias, which starts at 0, is added.
    """

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, I) -> (B, H / stride, W / stride, O)."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        return _biased(self, conv.conv2d(x, _kernel(self, x, kaiming, shape), self.stride))


class GatheredConv(nn.Module):
    """Convolution in groups of filters, of which each reads input channels of its own choice, padding k // 2.

    The choice is no parameter: int32 arrays among the statistics, so that variables say all by themselves. Fresh ones
    spread it evenly.

    Attributes:
        features: O.
        kept: channels that a group reads.
        feature_group_count: n, divides O.
        size, stride, use_bias: as in Conv.
        form: how it is computed, as ops.gathered.conv2d takes it.
    """

    features: int
    kept: int
    feature_group_count: int
    size: int = 3
    stride: int = 1
    use_bias: bool = False
    form: str | None = None

    is_gathered: ClassVar[bool] = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, I) -> (B, H / stride, W / stride, O)."""
        channels, groups = x.shape[-1], self.feature_group_count
        starts = np.arange(groups) * channels // groups
        spread = np.sort((starts[:, None] + np.arange(self.kept)) % channels)
        inputs = self.variable("batch_stats", "inputs", jnp.asarray, spread.ravel(), jnp.int32)
        outputs = self.variable("batch_stats", "outputs", jnp.arange, self.features, dtype=jnp.int32)
        kernel = _kernel(self, x, kaiming, (self.size, self.size, self.kept, self.features))
        return _biased(self, gathered.conv2d(x, kernel, inputs.value, outputs.value, self.stride, self.form))


def _biased(layer: nn.Module, y: jax.Array) -> jax.Array:
    """y with the layer's bias, which starts at 0, if it uses one."""
    if not layer.use_bias:
        return y
    bias = layer.param("bias", nn.initializers.zeros, (layer.features,), jnp.float32)
    return y + bias.astype(y.dtype)[None, None, None]


class RoutedConv(nn.Module):
    """Convolution whose output channels are one expert's, chosen per image.

    Every expert reads the whole input by position; the kernel is (k, k, I, C_store) with one window of w output
    channels an expert. Source: AdvMoE, section 3.

    Attributes:
        channels: C of the dense layer.
        width: w.
        num_experts: E.
        experts: "shared" | "disjoint", see ops.routing.offsets.
        expert_init: "equal" | "independent".
        size, stride: as in Conv.
    """

    channels: int
    width: int
    num_experts: int
    experts: str
    expert_init: str = "independent"
    size: int = 3
    stride: int = 1

    def _init(self, key, shape, dtype=jnp.float32):
        """Kaiming. "equal" gives every window the same w filters: all experts start as one, so that a change of route,
        which an attack causes all the time in an untrained network, changes nothing until they have grown apart.
        Where windows overlap, each channel has its filter of the last window that holds it, and experts start equal
        but for the channels that they share with a later one."""
        if self.expert_init == "independent":
            return kaiming(key, shape, dtype)
        place = np.arange(shape[3]) % self.width
        for start in routing.offsets(self.num_experts, self.width, self.channels, self.experts):
            place[start:start + self.width] = np.arange(self.width)
        return kaiming(key, (*shape[:3], self.width), dtype)[..., place]

    @nn.compact
    def __call__(self, x: jax.Array, choice: Choice) -> jax.Array:
        """(B, H, W, I) -> (B, H / stride, W / stride, w)."""
        starts = routing.offsets(self.num_experts, self.width, self.channels, self.experts)
        stored = self.num_experts * self.width if self.experts == "disjoint" else self.channels
        shape = (self.size, self.size, x.shape[-1], stored)
        return dispatch.conv(x, _kernel(self, x, self._init, shape), choice, starts, self.width, self.stride)


@dataclasses.dataclass(frozen=True)
class Experts:
    """What the routed layers of a network have in common: fields of `config.model`.

    Attributes:
        num_experts: E; 1: no layer is routed.
        model_scale: r.
        experts, expert_init: as of RoutedConv.
    """

    num_experts: int
    model_scale: float
    experts: str
    expert_init: str

    @property
    def are_several(self) -> bool:
        return self.num_experts > 1


def experts_of(cfg) -> Experts:
    """Those that `config.model` describes."""
    return Experts(cfg.num_experts, cfg.model_scale, cfg.experts, cfg.expert_init)


def expert_conv(x: jax.Array, choose: Choose, experts: Experts, channels: int, size: int = 3, stride: int = 1, *,
                name: str, is_routed: bool = True) -> jax.Array:
    """A convolution of a block, (B, H, W, I) -> (B, H / stride, W / stride, w): routed if there are several experts,
    else a narrowed one. Called in a compact method, whose module gets the layer.

    Args:
        x: its input.
        choose: tells a routed layer what its images take.
        experts: of the network.
        channels: C of the dense layer, of which w = floor(r * C).
        size, stride: as in Conv.
        name: of the layer.
        is_routed: whether it is, where there are several experts.
    """
    width = scaled_width(channels, experts.model_scale)
    if experts.are_several and is_routed:
        layer = RoutedConv(channels, width, experts.num_experts, experts.experts, experts.expert_init, size, stride,
                           name=name)
        return layer(x, choose(x))
    return Conv(width, size, stride, name=name)(x)


def scaled_width(channels: int, model_scale: float, what: str = "a layer") -> int:
    """floor(r * C): the width of one expert and of a small dense layer.

    Args:
        channels: C of the dense layer.
        model_scale: r.
        what: the name of the layer in messages.
    Raises:
        UserError: it is 0.
    """
    width = int(model_scale * channels)
    if width < 1:
        least = math.ceil(_ROUNDED / channels) / _ROUNDED
        raise UserError(f"model.model_scale is {model_scale:g}, which leaves none of the {channels} channels of "
                        f"{what}: expected {least:g} or more")
    return width


def blocks_of_stage(depth: int, name: str, backbone: str, others: int, such_as: str) -> int:
    """n of a network of 6 n + others layers, which has three stages of n blocks of two layers.

    Args:
        depth: layers of the network.
        name: of the field that has it.
        backbone: its name in messages.
        others: layers that are in no block.
        such_as: depths that papers have, in words.
    Raises:
        UserError: there is no such depth, or n is not 1 to 200.
    """
    count, rest = divmod(depth - others, 6)
    if rest or not 1 <= count <= _MOST_BLOCKS:
        near = 6 * min(max(round((depth - others) / 6), 1), _MOST_BLOCKS) + others
        raise UserError(f"{name} of a {backbone} is {depth}: expected 6 n + {others}, such as {such_as}; the nearest "
                        f"is {near}")
    return count


def global_average_pool(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, C), float32 at least."""
    return batch_norm.sum_pixels(x) / (x.shape[1] * x.shape[2])
