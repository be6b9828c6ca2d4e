"""ResNet with basic blocks: dense, small-dense and mixture-of-experts, CIFAR and ImageNet stems.

He et al., CVPR 2016, as the AdvMoE paper uses it (post-activation; the CIFAR form has a 3x3 stem). With one expert
it is the dense network narrowed by `model_scale`. With several, the block convolutions are routed; in the CIFAR
form the stem keeps its full width and the 1x1 shortcuts stay dense, in the ImageNet form the stem is narrowed and
the shortcuts are routed too.

B batch, H W height and width, C channels, E experts, K classes.
"""

import dataclasses
from collections.abc import Iterator

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
    RoutedConv,
    global_average_pool,
    scaled_width,
)

DEPTHS = {"10": (1, 1, 1, 1), "18": (2, 2, 2, 2), "34": (3, 4, 6, 3)}
STEMS = ("cifar", "imagenet")


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a ResNet."""

    depth: int = setting(18, f"layers: {', '.join(DEPTHS)}",
                         read=lambda depth, name: one_of(f"{name} of a resnet", str(depth), DEPTHS))
    stem: str = setting("cifar", "a 3x3 convolution, or a 7x7 one and a pool", choices=STEMS)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Shape of one basic block: channels of the dense network, width and stride of this one."""

    name: str
    channels: int
    width: int
    stride: int
    has_shortcut: bool


class ResNet(nn.Module):
    """The backbone. Attributes are the fields of `config.model`; `stage_sizes` is blocks a stage."""

    num_classes: int
    width: int
    stage_sizes: tuple[int, ...]
    stem: str
    num_experts: int
    model_scale: float
    experts: str
    expert_init: str

    @property
    def stem_width(self) -> int:
        routed_cifar = self.num_experts > 1 and self.stem == "cifar"
        return self.width if routed_cifar else scaled_width(self.width, self.model_scale)

    def blocks(self) -> Iterator[_Block]:
        """The blocks in order."""
        incoming = self.stem_width
        for stage, size in enumerate(self.stage_sizes):
            channels = self.width * 2**stage
            width = scaled_width(channels, self.model_scale)
            for i in range(size):
                stride = 2 if stage > 0 and i == 0 else 1
                yield _Block(f"layer{stage + 1}_{i}", channels, width, stride,
                             has_shortcut=stride > 1 or incoming != width)
                incoming = width

    @property
    def routes_shortcuts(self) -> bool:
        return self.num_experts > 1 and self.stem == "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) images in [0, 1] -> (B, K) logits. `train` as of `layers.BatchNorm`."""
        imagenet = self.stem == "imagenet"
        x = Conv(self.stem_width, 7 if imagenet else 3, 2 if imagenet else 1, name="conv1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks():
            x = BasicBlock(block, self.num_experts, self.experts, self.expert_init, self.routes_shortcuts,
                           name=block.name)(x, choose, train)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="linear")(
            global_average_pool(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    block: _Block
    num_experts: int
    experts: str
    expert_init: str
    routes_shortcut: bool

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) -> (B, H / stride, W / stride, width)."""
        block = self.block

        def conv(x, name, size=3, stride=1, routed=self.num_experts > 1):
            if routed:
                layer = RoutedConv(block.channels, block.width, self.num_experts, self.experts, self.expert_init,
                                   size, stride, name=name)
                return layer(x, choose(x))
            return Conv(block.width, size, stride, name=name)(x)

        def norm(x, name):
            return BatchNorm(name=name)(x, train)

        y = nn.relu(norm(conv(x, "conv1", stride=block.stride), "bn1"))
        y = norm(conv(y, "conv2"), "bn2")
        if block.has_shortcut:
            x = norm(conv(x, "shortcut", 1, block.stride, self.routes_shortcut), "shortcut_bn")
        return checkpoint_name(nn.relu(x + y), BLOCK)


def backbone(cfg, num_classes: int) -> ResNet:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, stem, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    """
    sizes = DEPTHS[one_of("model.depth of a resnet", str(cfg.depth), DEPTHS)]
    return ResNet(num_classes, cfg.width, sizes, one_of("model.stem", cfg.stem, STEMS), cfg.num_experts,
                  cfg.model_scale, cfg.experts, cfg.expert_init)
