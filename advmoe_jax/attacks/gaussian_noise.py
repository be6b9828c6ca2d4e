"""Gaussian noise: the weakest that changes the class, as Foolbox has it, or of a fixed strength.

x images (B, H, W, C) in [0, 1]. Foolbox draws anew for each strength; here a draw keeps its direction while
its strength is searched.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, sampling, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.fields import setting

ABOUT = About(("l2", "l1"), takes="values", fixed_by="sigma")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of Gaussian noise. The search measures in the norm; linf, the largest number of all, says little about
    noise."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps("0.5")
    sigma: str | float = setting(0.0, "standard deviation of noise that is then clipped to the box, whatever eps is; "
                                      "0 to search", least=0, most=1)
    draws: int = settings.count(10, "of which each image keeps the worst: the one of least norm, or with a sigma the "
                                    "one that breaks it, or has the highest cross-entropy; those of fewer are among "
                                    "those of more")
    num_steps: int = settings.count(20, "equal steps in which each draw of a search ascends to eps; halving one of "
                                        "them takes up to 7 more")
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "gaussian-noise", or with a sigma "gaussian-noise-0.1", "gaussian-noise-0.1-worst-of-10"."""
    return sampling.label("gaussian-noise", config.sigma, config.draws)


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    A search gives the misclassified image that is nearest, or without one the image of the highest cross-entropy, the
    clean one included.
    """
    return sampling.attack_by(noise, ABOUT, config, "gaussian_noise")


def noise(key: jax.Array, x: jax.Array, sigma: jax.Array) -> jax.Array:
    """One image (H, W, C) with noise."""
    return jnp.clip(x + sigma * jax.random.normal(key, x.shape, x.dtype), 0, 1)
