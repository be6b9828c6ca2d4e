"""Rotation as MoL has it (Cheng et al., WACVW 2022): each image by its own random angle.

x images (B, H, W, C) in [0, 1]. The reference code draws one angle a batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import warp

ABOUT = About(takes="values", all_images=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of rotation; the default is MoL's."""

    limit: float = setting(180.0, "degrees; the angle is uniform in [-limit, limit]", least=0, most=180)


def label(config: Config) -> str:
    """As tables name it: "rotation", "rotation-30"."""
    return "rotation" if config.limit == 180 else f"rotation-{config.limit}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; the model and `y` do not matter.

    The nearest pixel is taken, and 0 from outside.
    """
    limit = settings.read("rotation", config).limit
    return build.of_images(lambda keys, x: rotate(x, angles(keys, limit)))


@jax.jit
def angles(keys: jax.Array, limit: float) -> jax.Array:
    """(B,) keys -> (B,) degrees in [-limit, limit]."""
    return limit * jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32, -1, 1))(keys)


@jax.jit
def rotate(x: jax.Array, degrees: jax.Array) -> jax.Array:
    """Turns each image counter-clockwise by its own number of degrees (B,)."""
    return warp.warp(x, degrees, jnp.zeros((x.shape[0], 2), x.dtype), bilinear=False)
