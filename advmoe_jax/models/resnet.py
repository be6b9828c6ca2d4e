"""ResNet with basic or bottleneck blocks: dense, small-dense and mixture-of-experts, CIFAR and ImageNet stems.

He et al., CVPR 2016, as the AdvMoE paper uses it (post-activation; the CIFAR form has a 3x3 stem and no pool). From 50
layers on blocks are bottlenecks, 1x1, 3x3 and 1x1 with four times the channels, with the stride in the 3x3, as
torchvision has them. With one expert it is the dense network narrowed by `model_scale`. With several, the block
convolutions are routed; in the CIFAR form the stem keeps its full width and the 1x1 shortcuts stay dense, in the
ImageNet form the stem is narrowed and the shortcuts are routed too.

B batch, H W height and width, C channels, E experts, K classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping

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
    expert_conv,
    experts_of,
    global_average_pool,
    scaled_width,
)
from advmoe_jax.models.needs import Needs

DEPTHS = {"10": (1, 1, 1, 1), "18": (2, 2, 2, 2), "34": (3, 4, 6, 3)}
"""Blocks of each stage, of basic blocks."""
BOTTLENECKS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
"""The same of bottlenecks."""
STEMS = ("cifar", "imagenet")
_IMAGENET_PIXELS = 33  # of 32 the stem, which quarters a side, and three strides would leave one
_EXPANSION = 4


def _depth(depth: int, name: str) -> str:
    return one_of(f"{name} of a resnet", str(depth), (*DEPTHS, *BOTTLENECKS))


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a ResNet."""

    depth: int = setting(18, f"layers: {', '.join(DEPTHS)}, or with bottlenecks {', '.join(BOTTLENECKS)}", read=_depth)
    stem: str = setting("cifar", "a 3x3 convolution, or a 7x7 one and a pool", choices=STEMS)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Shape of one block. Channels are those of the dense network.

    Attributes:
        convs: (channels, size, stride) of each convolution.
        shortcut: the same of the 1x1 convolution of the shortcut; None: it has none.
    """

    name: str
    convs: tuple[tuple[int, int, int], ...]
    shortcut: tuple[int, int, int] | None


class ResNet(nn.Module):
    """The backbone.

    Attributes:
        num_classes: K.
        width: channels of the first stage of the dense network.
        stage_sizes: blocks of each stage.
        is_bottleneck: whether they are bottlenecks.
        stem: one of STEMS.
        experts: of the routed layers.
    """

    num_classes: int
    width: int
    stage_sizes: tuple[int, ...]
    is_bottleneck: bool
    stem: str
    experts: Experts

    @property
    def stem_width(self) -> int:
        routed_cifar = self.experts.are_several and self.stem == "cifar"
        return self.width if routed_cifar else scaled_width(self.width, self.experts.model_scale)

    def blocks(self) -> Iterator[_Block]:
        """The blocks in order."""
        incoming = self.stem_width
        for stage, size in enumerate(self.stage_sizes):
            inner = self.width * 2**stage
            outer = _EXPANSION * inner if self.is_bottleneck else inner
            for i in range(size):
                stride = 2 if stage > 0 and i == 0 else 1
                convs = (((inner, 1, 1), (inner, 3, stride), (outer, 1, 1)) if self.is_bottleneck else
                         ((inner, 3, stride), (outer, 3, 1)))
                outgoing = scaled_width(outer, self.experts.model_scale)
                has_shortcut = stride > 1 or incoming != outgoing
                yield _Block(f"layer{stage + 1}_{i}", convs, (outer, 1, stride) if has_shortcut else None)
                incoming = outgoing

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, K) logits. `train` as of `layers.BatchNorm`."""
        imagenet = self.stem == "imagenet"
        x = Conv(self.stem_width, 7 if imagenet else 3, 2 if imagenet else 1, name="conv1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks():
            x = Block(block, self.experts, routes_shortcut=imagenet, name=block.name)(x, choose, train)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="linear")(
            global_average_pool(x))


class Block(nn.Module):
    """Two or three convolutions and a shortcut."""

    block: _Block
    experts: Experts
    routes_shortcut: bool

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width)."""
        def normed(x, name, norm, shape, is_routed=True):
            x = expert_conv(x, choose, self.experts, *shape, name=name, is_routed=is_routed)
            return BatchNorm(name=norm)(x, train)

        y, last = x, len(self.block.convs)
        for i, shape in enumerate(self.block.convs, 1):
            y = normed(y, f"conv{i}", f"bn{i}", shape)
            y = nn.relu(y) if i < last else y
        if self.block.shortcut:
            x = normed(x, "shortcut", "shortcut_bn", self.block.shortcut, self.routes_shortcut)
        return checkpoint_name(nn.relu(x + y), BLOCK)


def backbone(cfg, num_classes: int) -> ResNet:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, stem, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    """
    depth = _depth(cfg.depth, "model.depth")
    return ResNet(num_classes, cfg.width, (DEPTHS | BOTTLENECKS)[depth], depth in BOTTLENECKS,
                  one_of("model.stem", cfg.stem, STEMS), experts_of(cfg))


def needs(cfg) -> Needs:
    """As `models.needs.Needs`."""
    return needs_of_stem(cfg.stem, {"the first stage (model.width)": cfg.width})


def needs_of_stem(stem: str, channels: Mapping[str, int]) -> Needs:
    """Those of a network with one of STEMS. Images that the CIFAR stem is for are too small for the other one."""
    if stem == "imagenet":
        return Needs(channels, _IMAGENET_PIXELS, "model.stem=imagenet", "model.stem=cifar")
    return Needs(channels)
