"""Salt and pepper: pixels that turn white or black, as few as change the class, as Foolbox has it, or a fixed share.

x images (B, H, W, C) in [0, 1]. Foolbox draws anew for each share; here the pixels of a draw stay as the share grows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, sampling, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.fields import setting

ABOUT = About(("l2", "l1"), takes="values", fixed_by="amount")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of salt and pepper. The search measures in the norm, and its budget is MoL's for CIFAR-10."""

    norm: str = settings.norm(ABOUT, "l1")
    eps: str | float = settings.eps("16")
    amount: str | float = setting(0.0, "share of the pixels, half of them white and half black on average, whatever "
                                       "eps is; 0 to search", least=0, most=1)
    whole_pixels: bool = setting(True, "whether all channels of a pixel turn at once")
    draws: int = settings.count(10, "as in gaussian_noise")
    num_steps: int = settings.count(20, "as in gaussian_noise")
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "salt-pepper", or with an amount "salt-pepper-0.1", "salt-pepper-0.1-worst-of-10"."""
    return sampling.label("salt-pepper", config.amount, config.draws)


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as gaussian_noise.make does.
    """
    noise = pixel_noise if config.whole_pixels else channel_noise
    return sampling.attack_by(noise, ABOUT, config, "salt_pepper")


def pixel_noise(key: jax.Array, x: jax.Array, amount: jax.Array) -> jax.Array:
    """One image (H, W, C) of which that share of the pixels is 0 or 1 in all channels."""
    return _turned(jax.random.uniform(key, (*x.shape[:2], 1), x.dtype), x, amount)


def channel_noise(key: jax.Array, x: jax.Array, amount: jax.Array) -> jax.Array:
    """One image (H, W, C) of which that share of the numbers is 0 or 1."""
    return _turned(jax.random.uniform(key, x.shape, x.dtype), x, amount)


def _turned(places, x, amount):
    return jnp.where(places < amount / 2, 0, jnp.where(places >= 1 - amount / 2, 1, x))
