"""VGG for CIFAR: dense, small-dense and mixture-of-experts.

Simonyan & Zisserman, ICLR 2015, in the form that CIFAR has: 3x3 convolutions with bias and BatchNorm, five pools, one
linear layer. With one expert it is the dense network narrowed by `model_scale`. With several, all convolutions but the
first are routed, and no convolution has a bias: the BatchNorm behind it takes its mean away and adds one of its own.

A pool is left out where the image is a single row or column, so that images smaller than 32x32 go through. What is
left of larger ones is averaged.

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
    expert_conv,
    experts_of,
    global_average_pool,
    scaled_width,
)

DEPTHS = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}
"""Convolutions before each pool."""
_MULTIPLES = (1, 2, 4, 8, 8)  # of the width, in each stage


def _depth(depth: int, name: str) -> str:
    return one_of(f"{name} of a vgg", str(depth), DEPTHS)


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a VGG."""

    depth: int = setting(16, f"layers: {', '.join(DEPTHS)}, those of the form for ImageNet", read=_depth)


class VGG(nn.Module):
    """The backbone. Layers have the numbers that PyTorch's `features` give them: a convolution, its norm, its ReLU and
    a pool are one each.

    Attributes:
        num_classes: K.
        width: channels of the first stage of the dense network.
        stage_sizes: convolutions before each pool.
        experts: of the routed layers.
    """

    num_classes: int
    width: int
    stage_sizes: tuple[int, ...]
    experts: Experts

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, K) logits. `train` as of `layers.BatchNorm`."""
        place = 0
        for size, multiple in zip(self.stage_sizes, _MULTIPLES):
            for _ in range(size):
                channels, name = self.width * multiple, f"features_{place}"
                if self.experts.are_several and place:
                    x = expert_conv(x, choose, self.experts, channels, name=name)
                else:
                    x = Conv(scaled_width(channels, self.experts.model_scale), name=name,
                             use_bias=not self.experts.are_several)(x)
                x = nn.relu(BatchNorm(name=f"features_{place + 1}")(x, train))
                place += 3
            if min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = checkpoint_name(x, BLOCK)
            place += 1
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="classifier")(
            global_average_pool(x))


def backbone(cfg, num_classes: int) -> VGG:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    """
    return VGG(num_classes, cfg.width, DEPTHS[_depth(cfg.depth, "model.depth")], experts_of(cfg))
