"""ResNet of 6 n + 2 layers for CIFAR: dense, small-dense and mixture-of-experts.

He et al., CVPR 2016, section 4.2: a 3x3 stem, three stages of n basic blocks with 16, 32 and 64 channels, and
shortcuts without parameters (option A), which take every second pixel and add empty channels. With one expert it is
the dense network narrowed by `model_scale`; with several, the block convolutions are routed. The stem is narrowed in
both cases, so that no shortcut has to drop channels.

B batch, H W height and width, C channels, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from advmoe_jax.core.errors import one_of
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

PADS = ("end", "both")
_STAGES = 3


def _blocks(depth: int, name: str) -> int:
    return blocks_of_stage(depth, name, "cifar_resnet", 2, "20, 32, 44, 56 or 110")


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a ResNet of CIFAR."""

    width: int = setting(16, "channels of the first stage of the dense network", least=1, most=16384)
    depth: int = setting(20, "layers, 6 n + 2: 20, 32, 44, 56, 110", read=_blocks)
    shortcut_pad: str = setting("end", "where shortcuts add empty channels: behind the others, or half on either side",
                                choices=PADS)


class CifarResNet(nn.Module):
    """The backbone.

    Attributes:
        num_classes: K.
        width: channels of the first stage of the dense network.
        blocks: of a stage.
        shortcut_pad: one of PADS.
        experts: of the routed layers.
    """

    num_classes: int
    width: int
    blocks: int
    shortcut_pad: str
    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, K) logits. `train` as of `layers.BatchNorm`."""
        x = Conv(scaled_width(self.width, self.experts.model_scale), name="conv1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train))
        for stage in range(_STAGES):
            for i in range(self.blocks):
                x = Block(self.width * 2**stage, 2 if stage and not i else 1, self.shortcut_pad, self.experts,
                          name=f"layer{stage + 1}_{i}")(x, choose, train)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="linear")(
            global_average_pool(x))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters."""

    channels: int
    stride: int
    shortcut_pad: str
    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width)."""
        y = expert_conv(x, choose, self.experts, self.channels, 3, self.stride, name="conv1")
        y = nn.relu(BatchNorm(name="bn1")(y, train))
        y = BatchNorm(name="bn2")(expert_conv(y, choose, self.experts, self.channels, name="conv2"), train)
        return checkpoint_name(nn.relu(shortcut(x, y.shape[-1], self.stride, self.shortcut_pad) + y), BLOCK)


def shortcut(x: jax.Array, channels: int, stride: int, pad: str) -> jax.Array:
    """(B, H, W, C) -> (B, H / stride, W / stride, channels): every so many pixels, and empty channels.

    Args:
        x: input of a block.
        channels: of its output, C or more.
        stride: of the block.
        pad: one of PADS. SR-GKP's models have "end", the weights of akamaster/pytorch_resnet_cifar10 "both".
    """
    missing = channels - x.shape[-1]
    before = missing // 2 if pad == "both" else 0
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (before, missing - before)))


def backbone(cfg, num_classes: int) -> CifarResNet:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, shortcut_pad, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    """
    return CifarResNet(num_classes, cfg.width, _blocks(cfg.depth, "model.depth"),
                       one_of("model.shortcut_pad", cfg.shortcut_pad, PADS), experts_of(cfg))


def needs(cfg) -> Needs:
    """As `models.needs.Needs`."""
    return Needs({"the first stage (model.width)": cfg.width})
