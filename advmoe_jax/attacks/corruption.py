"""CIFAR-C-like corruptions (Hendrycks & Dietterich, ICLR 2019), with the constants of the CIFAR-10-C generator.

"Like": random numbers differ, and snow is blurred along a line as ImageMagick does it, but not by ImageMagick.
x images (B, H, W, C) in [0, 1]; what comes back is rounded down to 8 bits, as the published images are.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.errors import one_of
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import colour, filters

ABOUT = About(takes="values", all_images=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a corruption."""

    kind: str = setting("gaussian_noise", "gaussian_noise, shot_noise, impulse_noise, fog, snow, brightness, contrast, "
                                          "defocus_blur or pixelate", read=lambda kind, what: one_of(what, kind, KINDS))
    severity: int = settings.count(3, "of the five that there are", most=5)


def label(config: Config) -> str:
    """As tables name it: "cifar-c-like-fog-3"."""
    return f"cifar-c-like-{config.kind.replace('_', '-')}-{config.severity}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; the model and `y` do not matter."""
    config = settings.read("corruption", config)
    level = KINDS[config.kind][1][config.severity - 1]
    corrupted = _corrupted_in_shapes if config.kind in _SHAPES else _corrupted_by_numbers
    return build.of_images(lambda keys, x: corrupted(keys, x, config.kind, level))


def _corrupted(keys, x, kind, level):
    corrupt = KINDS[kind][0]
    images = jax.vmap(lambda key, image: corrupt(key, image, level))(keys, x)
    return (colour.to_bytes(jnp.clip(images, 0, 1)) / 255).astype(x.dtype)


_corrupted_by_numbers = jax.jit(_corrupted, static_argnames="kind")
_corrupted_in_shapes = jax.jit(_corrupted, static_argnames=("kind", "level"))


# One image (H, W, C) each from here on.


def _gaussian_noise(key, x, sigma):
    return x + sigma * jax.random.normal(key, x.shape, x.dtype)


def _shot_noise(key, x, photons):
    return jax.random.poisson(key, photons * x) / photons


def _impulse_noise(key, x, amount):
    where, which = jax.random.split(key)
    white = jax.random.bernoulli(which, 0.5, x.shape).astype(x.dtype)
    return jnp.where(jax.random.bernoulli(where, amount, x.shape), white, x)


def _brightness(_, x, more):
    """Of the value in hue, saturation and value."""
    value = jnp.max(x, -1, keepdims=True)
    brighter = jnp.minimum(value + more, 1)
    return jnp.where(value > 0, x / jnp.where(value > 0, value, 1), 1) * brighter


def _contrast(_, x, share):
    mean = jnp.mean(x, (0, 1), keepdims=True)
    return (x - mean) * share + mean


def _defocus_blur(_, x, disk):
    kernel = filters.disk_kernel(*disk)
    reach = len(kernel) // 2
    padded = jnp.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    height, width, _ = x.shape
    return sum(float(weight) * padded[i:i + height, j:j + width] for (i, j), weight in np.ndenumerate(kernel))


def _pixelate(_, x, share):
    values = colour.to_bytes(x)
    smaller = [max(int(share * size), 1) for size in x.shape[:2]]
    for sizes in (smaller, x.shape[:2]):
        for axis in (1, 0):  # Pillow rounds after each
            resize = filters.box_matrix(values.shape[axis], sizes[axis])
            values = jnp.floor(filters.along(axis, resize, values) + 0.5)
    return values / 255


def _fog(key, x, level):
    amount, decay = level
    height, width, _ = x.shape
    size = max(1 << (max(height, width) - 1).bit_length(), 32)
    haze = filters.plasma(key, size, decay)[:height, :width, None]
    brightest = jnp.max(x)
    return (x + amount * haze) * brightest / (brightest + amount)


def _snow(key, x, level):
    mean, deviation, zoom, threshold, radius, sigma, kept = level
    flakes, direction = jax.random.split(key)
    layer = mean + deviation * jax.random.normal(flakes, x.shape[:2], x.dtype)
    for axis, size in enumerate(x.shape[:2]):
        layer = filters.along(axis, filters.zoom_matrix(size, zoom), layer)
    layer = colour.to_bytes(jnp.clip(jnp.where(layer < threshold, 0, layer), 0, 1))
    degrees = jax.random.uniform(direction, minval=-135, maxval=-45)
    layer = jnp.round(filters.motion_blur(layer, radius, sigma, degrees)) / 255
    grey = jnp.sum(colour.as_rgb(x) * jnp.asarray([[[0.299, 0.587, 0.114]]], x.dtype), -1, keepdims=True)
    whiter = kept * x + (1 - kept) * jnp.maximum(x, 1.5 * grey + 0.5)
    return whiter + (layer + layer[::-1, ::-1])[..., None]


KINDS = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "snow": (_snow, ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                     (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                     (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
"""The functions and, for each severity, their constants."""

_SHAPES = ("snow", "defocus_blur", "pixelate")  # whose constants are more than factors: each severity is compiled
