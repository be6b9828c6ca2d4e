"""Snow as MoL has it (Cheng et al., WACVW 2022): what is darker than a random point is bleached.

x images (B, H, W, C) in [0, 1], C 1 or 3; they are rounded down to 8 bits first.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import colour

ABOUT = About(takes="values", all_images=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of snow; the default is MoL's."""

    multiplier: float = setting(8.0, "of the lightness of pixels darker than the image's snow point, which is drawn "
                                     "from 85 to 212.5; MoL calls it darkness", least=0, most=1e6)


def label(config: Config) -> str:
    """As tables name it: "snow"."""
    return "snow" if config.multiplier == 8 else f"snow-{config.multiplier}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; the model and `y` do not matter.
    """
    multiplier = settings.read("snow", config).multiplier
    return build.of_images(lambda keys, x: _bleach(x, snow_points(keys), multiplier))


@jax.jit
def snow_points(keys: jax.Array) -> jax.Array:
    """(B,) keys -> (B,) lightness in bytes, uniform in [85, 212.5)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, 255 / 3, 255 / 3 + 255 / 2))(keys)


@jax.jit
def _bleach(x, points, multiplier):
    hls = colour.to_hls(colour.to_bytes(colour.as_rgb(x)))
    lightness = hls[..., 1]
    bleached = jnp.minimum(jnp.floor(multiplier * lightness), 255)
    lightness = jnp.where(lightness < points[:, None, None], bleached, lightness)
    return (colour.to_rgb(hls.at[..., 1].set(lightness)) / 255)[..., :x.shape[-1]].astype(x.dtype)
