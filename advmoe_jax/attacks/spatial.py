"""Rotations and translations: the worst of a grid, or of some at random (Engstrom et al., ICML 2019).

x images (B, H, W, C) in [0, 1]. An image is turned and moved in one bilinear reading; the reference code takes two.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, sampling, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import warp

ABOUT = About(takes="values")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the spatial attack; the defaults are the paper's for CIFAR-10."""

    pixels: float = setting(3.0, "most that an image is moved down or up, and right or left", least=0, most=1e4)
    degrees: float = setting(30.0, "most that it is turned either way", least=0, most=180)
    shifts: int = settings.count(5, "translations in each direction, equally spaced from -pixels to pixels", most=100)
    angles: int = settings.count(31, "rotations, equally spaced from -degrees to degrees; odd numbers have 0 too",
                                 most=1000)
    tries: int = settings.count(0, "0 for the whole grid; else the number of random tries, uniform in the whole range, "
                                   "of which each image keeps the worst; those of fewer are among those of more",
                               least=0)
    early_stop: bool = settings.early_stop(True)
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "spatial-grid", "spatial-worst-of-10"."""
    return f"spatial-worst-of-{config.tries}" if config.tries else "spatial-grid"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    x_adv is misclassified if any try is; among those, or without one, it has the highest cross-entropy.
    """
    config = settings.read("spatial", config)
    program = sampling.Tries(_moved, config, config.early_stop)
    return build.one_run(program, config.tries or len(grid(config)), config.driver)


def grid(config: Config) -> np.ndarray:
    """All (down, right, degrees) that there are, (shifts * shifts * angles, 3)."""
    def spaced(limit, number):
        return np.linspace(-limit, limit, number) if number > 1 else [0.0]

    shifts = spaced(config.pixels, config.shifts)
    return np.float32(list(itertools.product(shifts, shifts, spaced(config.degrees, config.angles))))


def _moved(config, inputs, i):
    """The images of try i."""
    x = inputs.rows["x"]
    if config.tries:
        limits = jnp.asarray([config.pixels, config.pixels, config.degrees], x.dtype)
        keys = rng.fold_in(inputs.rows["keys"], i)
        move = jax.vmap(lambda key: limits * jax.random.uniform(key, (3,), x.dtype, -1, 1))(keys)
    else:
        move = jnp.broadcast_to(jnp.asarray(grid(config))[i], (x.shape[0], 3))
    return jnp.clip(warp.warp(x, move[:, 2], move[:, :2], bilinear=True), 0, 1)
