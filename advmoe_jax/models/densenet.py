"""DenseNet-BC for CIFAR: dense, small-dense and mixture-of-experts.

Huang et al., CVPR 2017, section 3, in the form BC without dropout: a 3x3 stem and three dense blocks of n layers. Each
layer, a 1x1 convolution with four times as many channels as it adds and a 3x3 one, reads what the stem and all layers
of its block before it give. Between blocks a 1x1 convolution halves the channels, and a pool the pixels. DenseNet-BC-40
has n = 6 and adds 12 channels a layer.

With one expert it is the dense network narrowed by `model_scale`: the stem, and each layer of a block. With several,
both convolutions of each layer are routed. Transitions stay dense, and halve what they read. The released AdvMoE code
means this mixture, but does not build it, and narrows none of its layers. Its small dense network has four times the
narrowed growth rate in the 1x1 convolutions; here every layer has floor(r * C) channels, a few more where r does not
divide evenly.

The pool is left out where the image is a single row or column, so that any image goes through.

B batch, H W height and width, C channels, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from advmoe_jax.core.fields import setting
from advmoe_jax.models import network
from advmoe_jax.models.layers import (
    BLOCK,
    BatchNorm,
    Choose,
    Conv,
    Experts,
    blocks_of_stage,
    expert_conv,
    experts_of,
    global_average_pool,
    scaled_width,
)
from advmoe_jax.models.needs import Needs

_STAGES = 3
_BOTTLENECK = 4  # channels between the convolutions of a layer, by its growth rate


def _layers(depth: int, name: str) -> int:
    return blocks_of_stage(depth, name, "densenet", 4, "40, 100, 190 or 250")


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a DenseNet."""

    width: int = setting(24, "channels of the stem of the dense network; in the paper twice the growth rate", least=1,
                         most=16384)
    depth: int = setting(40, "layers, 6 n + 4: 40, 100, 190, 250", read=_layers)
    growth_rate: int = setting(12, "channels that each layer of the dense network adds", least=1, most=4096)


class DenseNet(nn.Module):
    """The backbone.

    Attributes:
        num_classes: K.
        width: channels of the stem of the dense network.
        growth_rate: channels that each of its layers adds.
        layers: of a block.
        experts: of the routed layers.
    """

    num_classes: int
    width: int
    growth_rate: int
    layers: int
    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, K) logits. `train` as of `layers.BatchNorm`."""
        x = Conv(scaled_width(self.width, self.experts.model_scale), name="conv1")(x)
        for stage in range(_STAGES):
            if stage:
                x = Transition(name=f"transition{stage}")(x, train)
            for i in range(self.layers):
                y = Layer(self.growth_rate, self.experts, name=f"block{stage + 1}_{i}")(x, choose, train)
                x = jnp.concatenate([x, y], -1)
        x = nn.relu(BatchNorm(name="bn")(x, train))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="linear")(
            global_average_pool(x))


class Layer(nn.Module):
    """What a layer of a dense block adds to its input: BatchNorm, ReLU and a convolution, 1x1 and then 3x3.

    Attributes:
        growth_rate: of the dense network.
        experts: of the routed layers.
    """

    growth_rate: int
    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, width)."""
        y = nn.relu(BatchNorm(name="bn1")(x, train))
        y = expert_conv(y, choose, self.experts, _BOTTLENECK * self.growth_rate, 1, name="conv1")
        y = nn.relu(BatchNorm(name="bn2")(y, train))
        # What is kept for gradients is what the layer adds: all that the next one reads would be kept n times.
        return checkpoint_name(expert_conv(y, choose, self.experts, self.growth_rate, name="conv2"), BLOCK)


class Transition(nn.Module):
    """BatchNorm, ReLU, a 1x1 convolution to half the channels, and a pool."""

    @nn.compact
    def __call__(self, x: jax.Array, train: int) -> jax.Array:
        """(B, H, W, C) -> (B, H // 2, W // 2, C // 2)."""
        y = Conv(max(1, x.shape[-1] // 2), 1, name="conv")(nn.relu(BatchNorm(name="bn")(x, train)))
        if min(y.shape[1:3]) > 1:
            y = nn.avg_pool(y, (2, 2), (2, 2))
        return checkpoint_name(y, BLOCK)


def backbone(cfg, num_classes: int) -> DenseNet:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, growth_rate, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    Raises:
        UserError: the depth is not 6 n + 4.
    """
    return DenseNet(num_classes, cfg.width, cfg.growth_rate, _layers(cfg.depth, "model.depth"), experts_of(cfg))


def needs(cfg) -> Needs:
    """As `models.needs.Needs`."""
    return Needs({"the stem (model.width)": cfg.width, "a layer of a block (model.growth_rate)": cfg.growth_rate})
