"""Images of their high or their low frequencies alone: SR-GKP's table 1 and figure 2 (NeurIPS 2023, section 3.1).

Wang et al., "High-frequency Component Helps Explain the Generalization of Convolutional Neural Networks", CVPR 2020:
each channel is transformed, and what is nearer than a radius to the zero frequency is its low part, the rest its high
part. Here the radius is theta times the highest frequency of a row, H / 2; theta 0 leaves the whole image to the high
part.

x images (B, H, W, C) in [0, 1]. The paper filters normalised images, (x - mean) / std by channel. Channels are filtered
one by one, so that std does not matter; mean is what stands in for the image's own, which goes with the zero frequency.

What leaves [0, 1] is clipped, as in every attack here, and as any file would; the paper says nothing of it and may not.
It makes no difference to its table: on 500 test images of CIFAR-10 an imported ResNet-20 got 77.2, 51.8 and 22.8 % of
the high parts at theta 0.3, 0.5 and 0.7, clipped or not (the paper's ResNet-56: 77.05, 50.77 and 22.79), for at most
0.02 % of the pixels leave. Of the low parts 2 % do, and clipping was worth up to one point.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting

ABOUT = About(takes="values", all_images=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the filter."""

    part: str = setting("high", "which frequencies are left", choices=("high", "low"))
    theta: float = setting(0.5, "radius in units of H / 2, below which a frequency is low", least=0, most=1)
    mean: str | float = setting("0.4914 0.4822 0.4465", "means of the channels, one number or one for each, separated "
                                                        "by spaces")


def label(config: Config) -> str:
    """As tables name it, by the papers' names of the parts: "hfc-0.3", "lfc-0.3"."""
    return f"{config.part[0]}fc-{config.theta}"


def check(config: Config, channels: int) -> None:
    """Raises UserError if `mean` is for images of other channels."""
    settings.check_channels("frequency", "mean", config.mean, channels)


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; the model, the key and `y` do not matter.

    Raises:
        UserError: a setting is out of range, or there are other channels than in `mean`.
    """
    config = settings.read("frequency", config)
    mean = np.array([units.number(text, "frequency's mean") for text in str(config.mean).split()], np.float32)
    if mean.size == 0 or np.any((mean < 0) | (mean > 1)):
        raise UserError(f"frequency has mean={config.mean!r}: expected numbers from 0 to 1, one for each channel")

    def run(_, x):
        check(config, x.shape[-1])
        return _filtered(x, config.theta, mean.astype(x.dtype)[None, None, None], config.part)

    return build.of_images(run)


@jax.jit
def low_part(x: jax.Array, theta: float) -> jax.Array:
    """(B, H, W, C) -> what of each channel has frequencies below theta times the highest of rows and columns."""
    rows, columns = (2 * np.fft.fftfreq(size) for size in x.shape[1:3])
    radius = jnp.asarray(np.hypot(rows[:, None], columns)[None, :, :, None], x.dtype)
    waves = jnp.fft.fft2(x, axes=(1, 2))
    return jnp.fft.ifft2(jnp.where(radius < theta, waves, 0), axes=(1, 2)).real.astype(x.dtype)


def _filtered(x, theta, mean, part):
    """At theta 0 the high part is x, to the bit."""
    low = low_part(x - mean, theta)
    return jnp.clip(mean + low if part == "low" else x - low, 0, 1)
