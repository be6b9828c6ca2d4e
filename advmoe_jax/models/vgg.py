"""VGG for CIFAR: dense, small-dense and mixture-of-experts.

Simonyan & Zisserman, ICLR 2015, in the form that CIFAR has: 3x3 convolutions with bias and BatchNorm, five pools, one
linear layer. With one expert it is the dense network narrowed by `model_scale`. With several, all convolutions but the
first are routed, and no convolution has a bias: the BatchNorm behind it takes its mean away and adds one of its own.

The released AdvMoE code (OPTML-Group/Robust-MoE-CNN) has another form, `form=released`: no pool behind the last
convolution, what is left averaged to 2x2, and three linear layers, of which two have 256 outputs whatever
`model_scale` is; no convolution has a bias. The first of the three, which reads 2x2 pixels, is stored as a convolution
of that size.

A pool is left out where the image is a single row or column, so that images smaller than 32x32 go through. What is
left of larger ones is averaged. The released form takes 32x32 or more.

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
    expert_conv,
    experts_of,
    global_average_pool,
    scaled_width,
)
from advmoe_jax.models.needs import Needs

DEPTHS = {"11": (1, 1, 2, 2, 2), "13": (2, 2, 2, 2, 2), "16": (2, 2, 3, 3, 3), "19": (2, 2, 4, 4, 4)}
"""Convolutions before each pool."""
FORMS = ("cifar", "released")
_MULTIPLES = (1, 2, 4, 8, 8)  # of the width, in each stage
_HIDDEN, _SIDE = 256, 2  # outputs of the hidden linear layers of the released form, and pixels of a side that they read


def _depth(depth: int, name: str) -> str:
    return one_of(f"{name} of a vgg", str(depth), DEPTHS)


@dataclasses.dataclass(frozen=True)
class Config(network.Config):
    """Fields of `config.model` for a VGG."""

    depth: int = setting(16, f"layers: {', '.join(DEPTHS)}, those of the form for ImageNet", read=_depth)
    form: str = setting("cifar", "five pools and one linear layer, or as the released AdvMoE code four and three",
                        choices=FORMS)


class VGG(nn.Module):
    """The backbone. Layers have the numbers that PyTorch's `features` give them: a convolution, its norm, its ReLU and
    a pool are one each.

    Attributes:
        num_classes: K.
        width: channels of the first stage of the dense network.
        stage_sizes: convolutions before each pool.
        experts: of the routed layers.
        form: one of FORMS.
    """

    num_classes: int
    width: int
    stage_sizes: tuple[int, ...]
    experts: Experts
    form: str = FORMS[0]

    @nn.compact
    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """(B, H, W, C) images -> (B, K) logits. `train` as of `layers.BatchNorm`."""
        place, last, released = 0, len(self.stage_sizes) - 1, self.form == "released"
        for stage, (size, multiple) in enumerate(zip(self.stage_sizes, _MULTIPLES)):
            for _ in range(size):
                channels, name = self.width * multiple, f"features_{place}"
                if self.experts.are_several and place:
                    x = expert_conv(x, choose, self.experts, channels, name=name)
                else:
                    x = Conv(scaled_width(channels, self.experts.model_scale), name=name,
                             use_bias=not self.experts.are_several and not released)(x)
                x = nn.relu(BatchNorm(name=f"features_{place + 1}")(x, train))
                place += 3
            if min(x.shape[1:3]) > 1 and not (released and stage == last):
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = checkpoint_name(x, BLOCK)
            place += 1
        init = nn.initializers.normal(0.01)
        if not released:
            return nn.Dense(self.num_classes, kernel_init=init, name="classifier")(global_average_pool(x))
        x = nn.Conv(_HIDDEN, (_SIDE, _SIDE), padding="VALID", kernel_init=init, name="classifier_0")(_averaged(x))
        x = nn.Dense(_HIDDEN, kernel_init=init, name="classifier_2")(nn.relu(x[:, 0, 0]))
        return nn.Dense(self.num_classes, kernel_init=init, name="classifier_4")(nn.relu(x))


def _averaged(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, 2, 2, C), means as PyTorch's AdaptiveAvgPool2d(2) takes them, which overlap where a side is
    odd."""
    parts = [[slice(i * size // _SIDE, -(-(i + 1) * size // _SIDE)) for i in range(_SIDE)] for size in x.shape[1:3]]
    return jnp.stack([jnp.stack([global_average_pool(x[:, rows, columns]) for columns in parts[1]], 1)
                      for rows in parts[0]], 1)


def backbone(cfg, num_classes: int) -> VGG:
    """Builds the network that `config.model` describes.

    Args:
        cfg: fields width, depth, form, num_experts, model_scale, experts, expert_init.
        num_classes: K.
    """
    return VGG(num_classes, cfg.width, DEPTHS[_depth(cfg.depth, "model.depth")], experts_of(cfg),
               one_of("model.form", cfg.form, FORMS))


def needs(cfg) -> Needs:
    """As `models.needs.Needs`."""
    channels = {"the first stage (model.width)": cfg.width}
    if cfg.form == "released":
        return Needs(channels, _SIDE * 2**(len(_MULTIPLES) - 1), "model.form=released", "model.form=cifar")
    return Needs(channels)
