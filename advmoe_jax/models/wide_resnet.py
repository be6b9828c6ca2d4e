"""Wide ResNet with pre-activation: dense, small-dense and mixture-of-experts, CIFAR and ImageNet stems.

Zagoruyko & Komodakis, BMVC 2016, table 1, without dropout: a 3x3 stem of 16 channels and three stages of n blocks with
16 k, 32 k and 64 k channels; WRN-28-10 is depth=28, width=160. The ImageNet form, as the AdvMoE paper uses it, has a
7x7 stem with a BatchNorm and a pool, and the same stages. With one expert it is the dense network narrowed by
`model_scale`. With several, the stem is narrowed too, and all convolutions of blocks are routed, 1x1 shortcuts among
them.

Where a block changes the channels, its first convolution and its shortcut read the same activation. In the mixtures of
the released AdvMoE code they read the input of the block as it is, and the BatchNorm before them has no effect.

B batch, H W height and width, C channels, K classes.
"""

import dataclasses

import jax
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
from advmoe_jax.models.resnet import STEMS, needs_of_stem

_STAGES = 3
_STEM_WIDTH = 16


def _blocks(depth: int, name: str) -> int:
    return blocks_of_stage(depth, name, "wide_resnet", 4, "16, 22, 28, 34 or 40")


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a Wide ResNet."""

    width: int = setting(160, "channels of the first stage of the dense network, 16 k for a WRN-d-k", least=1,
                         most=16384)
    depth: int = setting(28, "layers, 6 n + 4: 16, 22, 28, 34, 40", read=_blocks)
    stem: str = setting("cifar", "a 3x3 convolution, or a 7x7 one and a pool", choices=STEMS)


class WideResNet(nn.Module):
    """The backbone.

    Attributes:
        num_classes: K.
        width: channels of the first stage of the dense network.
        blocks: of a stage.
        stem: one of STEMS.
        experts: of the routed layers.
    """

    num_classes: int
    width: int
    blocks: int
    stem: str
    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, K) logits. `train` as of `layers.BatchNorm`."""
        imagenet = self.stem == "imagenet"
        stem_width = scaled_width(_STEM_WIDTH, self.experts.model_scale)
        x = Conv(stem_width, 7 if imagenet else 3, 2 if imagenet else 1, name="conv1")(x)
        if imagenet:
            x = nn.relu(BatchNorm(name="bn1")(x, train))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage in range(_STAGES):
            for i in range(self.blocks):
                x = Block(self.width * 2**stage, 2 if stage and not i else 1, self.experts,
                          name=f"layer{stage + 1}_{i}")(x, choose, train)
        x = nn.relu(BatchNorm(name="bn")(x, train))
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="linear")(
            global_average_pool(x))


class Block(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut.

    Attributes:
        channels: of the dense network.
        stride: of the first convolution and the shortcut.
        experts: of the routed layers.
    """

    channels: int
    stride: int
    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width)."""
        active = nn.relu(BatchNorm(name="bn1")(x, train))
        y = expert_conv(active, choose, self.experts, self.channels, 3, self.stride, name="conv1")
        y = nn.relu(BatchNorm(name="bn2")(y, train))
        y = expert_conv(y, choose, self.experts, self.channels, name="conv2")
        if self.stride > 1 or x.shape[-1] != y.shape[-1]:
            x = expert_conv(active, choose, self.experts, self.channels, 1, self.stride, name="shortcut")
        return checkpoint_name(x + y, BLOCK)


def backbone(cfg, num_classes: int) -> WideResNet:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, stem, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    Raises:
        UserError: the depth is not 6 n + 4, or there is no such stem.
    """
    return WideResNet(num_classes, cfg.width, _blocks(cfg.depth, "model.depth"), one_of("model.stem", cfg.stem, STEMS),
                      experts_of(cfg))


def needs(cfg) -> Needs:
    """As `models.needs.Needs`."""
    return needs_of_stem(cfg.stem, {"the stem": _STEM_WIDTH, "the first stage (model.width)": cfg.width})
