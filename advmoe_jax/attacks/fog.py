"""Fog as MoL has it (Cheng et al., WACVW 2022): one haze over the whole 8-bit image, the same for every image.

x images (B, H, W, C) in [0, 1]; they are rounded down to 8 bits first.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import colour

ABOUT = About(takes="values", all_images=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of fog; the defaults are MoL's."""

    t: float = setting(0.4, "thickness; an image keeps 1 / (1 + exp(t)) of itself", least=0, most=100)
    light: float = setting(1.2, "what the fog itself looks like; above 1 it is brighter than white", least=0, most=100)
    overflow: str = setting("wrap", "of what is brighter than white: wrap takes it modulo 256, so that bright pixels "
                                    "turn black, as the reference code does; clip leaves it white",
                            choices=("wrap", "clip"))


def label(config: Config) -> str:
    """As tables name it: "fog", "fog-clip"."""
    return "fog" if config.overflow == "wrap" else f"fog-{config.overflow}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; only `x` matters.
    """
    table = np.float32(levels(settings.read("fog", config)) / 255)
    return build.of_images(lambda _, x: _look_up(x, table))


def levels(config: Config) -> np.ndarray:
    """What each of the 256 grey levels turns into, (256,) whole numbers."""
    kept = 1 / (1 + np.exp(config.t))
    hazy = kept * np.arange(256) + (1 - kept) * config.light * 255
    hazy = np.floor(hazy + 1e-9)  # white in white fog is exactly white
    return hazy % 256 if config.overflow == "wrap" else np.minimum(hazy, 255)


_look_up = jax.jit(lambda x, table: table[colour.to_bytes(x).astype(jnp.int32)].astype(x.dtype))
