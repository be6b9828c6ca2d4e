"""Rotations and translations: the worst of a grid, or of some at random (Engstrom et al., ICML 2019).

x images (B, H, W, C) in [0, 1]. An image is turned and moved in one bilinear reading; the reference code takes two.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import driver, objectives, sampling, settings
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import warp

NORMS = ()
TAKES = "values"  # see parse.Spec


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the spatial attack; the defaults are the paper's for CIFAR-10.

    Attributes:
        pixels: most that an image is moved down or up, and right or left.
        degrees: most that it is turned either way, 0 to 180.
        shifts: number of translations in each direction, equally spaced from -pixels to pixels.
        angles: number of rotations, equally spaced from -degrees to degrees. Odd numbers have 0 among them.
        tries: 0 for the whole grid; else the number of random tries, uniform in the whole range, of which each image
            keeps the worst. The tries of fewer are among those of more.
        early_stop: whether an image is left alone once it is broken.
        driver: see attacks.driver.
    """

    pixels: float = 3
    degrees: float = 30
    shifts: int = 5
    angles: int = 31
    tries: int = 0
    early_stop: bool = True
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "spatial-grid", "spatial-worst-of-10"."""
    return f"spatial-worst-of-{config.tries}" if config.tries else "spatial-grid"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    x_adv is misclassified if any try is; among those, or without one, it has the highest cross-entropy.

    Raises:
        UserError: a setting is out of range.
    """
    settings.check("spatial", config, shifts=1, angles=1, tries=0)
    limits = {name: units.number(getattr(config, name), f"spatial's {name}") for name in ("pixels", "degrees")}
    if limits["pixels"] < 0:
        raise UserError(f"spatial has pixels={config.pixels}: expected 0 or more")
    if not 0 <= limits["degrees"] <= 180:
        raise UserError(f"spatial has degrees={config.degrees}: expected 0 to 180")
    config = dataclasses.replace(config, **limits)
    program = _Spatial(config)

    def attack(logits_fn, key, x, y):
        rows = dict(keys=rng.rowwise(key, x.shape[0]), x=x, y=y)
        inputs = driver.Inputs(objectives.partial(logits_fn, x), rows, None)
        num_steps = config.tries or len(grid(config))
        return jax.lax.stop_gradient(driver.run(program, inputs, num_steps, config.driver)["x"])

    return attack


def grid(config: Config) -> np.ndarray:
    """All (down, right, degrees) that there are, (shifts * shifts * angles, 3)."""
    def spaced(limit, number):
        return np.linspace(-limit, limit, number) if number > 1 else [0.0]

    shifts = spaced(config.pixels, config.shifts)
    return np.float32(list(itertools.product(shifts, shifts, spaced(config.degrees, config.angles))))


@dataclasses.dataclass(frozen=True)
class _Spatial:
    """The attack as a `driver.Program`; step i is try i."""

    config: Config
    cost = (1, 0)

    @property
    def stops(self):
        return self.config.early_stop

    def start(self, inputs: driver.Inputs) -> Any:
        return driver.none_yet(inputs.rows["x"])

    def step(self, inputs: driver.Inputs, carry: Any, i: jax.Array) -> Any:
        x = inputs.rows["x"]
        if self.config.tries:
            limits = jnp.asarray([self.config.pixels, self.config.pixels, self.config.degrees], x.dtype)
            keys = rng.fold_in(inputs.rows["keys"], i)
            move = jax.vmap(lambda key: limits * jax.random.uniform(key, (3,), x.dtype, -1, 1))(keys)
        else:
            move = jnp.broadcast_to(jnp.asarray(grid(self.config))[i], (x.shape[0], 3))
        moved = warp.warp(x, move[:, 2], move[:, :2], bilinear=True)
        return driver.worse(carry, sampling.look(inputs, jnp.clip(moved, 0, 1)))

    def done(self, carry: Any) -> jax.Array:
        return carry["broken"]

    def finish(self, inputs: driver.Inputs, carry: Any) -> Any:
        return carry
