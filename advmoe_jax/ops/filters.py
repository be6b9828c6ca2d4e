"""What single images are blurred, resized and clouded with."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def plasma(key: jax.Array, size: int, decay: float) -> jax.Array:
    """Diamond-square noise on a torus, (size, size) in [0, 1]; size is a power of 2."""
    noise = jax.random.uniform(key, (size, size), minval=-1, maxval=1)
    values, step, wobble = jnp.zeros((1, 1)), size, 100.0
    while step > 1:
        half = step // 2

        def mean(total, row, column):
            return total / 4 + wobble**2 * noise[row::step, column::step]

        below = values + jnp.roll(values, -1, 0)
        beside = values + jnp.roll(values, -1, 1)
        centres = mean(below + jnp.roll(below, -1, 1), half, half)
        beside = mean(beside + centres + jnp.roll(centres, 1, 0), 0, half)
        below = mean(below + centres + jnp.roll(centres, 1, 1), half, 0)
        pairs = jnp.stack([jnp.stack([values, beside], -1), jnp.stack([below, centres], -1)], 1)
        values, step, wobble = pairs.reshape(2 * len(values), -1), half, wobble / decay
    values -= jnp.min(values)
    return values / jnp.max(values)


def disk_kernel(radius: float, sigma: float) -> np.ndarray:
    """A disk, blurred by a Gaussian of three taps; odd side."""
    place = np.arange(-int(radius) - 1, int(radius) + 2)
    disk = np.float64(place[:, None] ** 2 + place[None] ** 2 <= radius**2)
    taps = np.exp(-np.float64([1, 0, 1]) / (2 * sigma**2))
    taps /= taps.sum()
    blurred = np.apply_along_axis(np.convolve, 0, disk / disk.sum(), taps, "same")
    return np.apply_along_axis(np.convolve, 1, blurred, taps, "same")


def box_matrix(before: int, after: int) -> np.ndarray:
    """Resizing as Pillow's BOX filter does: (after, before), rows that sum to 1."""
    scale = before / after
    support = max(scale, 1) / 2
    centre = (np.arange(after)[:, None] + 0.5) * scale
    distance = np.arange(before)[None] + 0.5 - centre
    inside = np.float32((-support < distance) & (distance <= support))
    return inside / inside.sum(1, keepdims=True)


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """Magnification of the middle by linear interpolation, (size, size)."""
    crop = math.ceil(size / factor)
    zoomed = round(crop * factor)
    first = (zoomed - size) // 2
    place = (size - crop) // 2 + (np.arange(size) + first) * (crop - 1) / max(zoomed - 1, 1)
    return np.float32(np.maximum(1 - np.abs(place[:, None] - np.arange(size)[None]), 0))


def motion_blur(layer: jax.Array, radius: int, sigma: float, degrees: jax.Array) -> jax.Array:
    """(H, W) of which each pixel is a mean of those along a ray, as ImageMagick's MotionBlurImage makes it.

    Args:
        layer: (H, W).
        radius: of 2 * radius + 1 weights.
        sigma: of the weights, in pixels: half of a Gaussian.
        degrees: where the ray goes, clockwise from the right.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    weights = jnp.asarray(weights / weights.sum(), layer.dtype)
    down, right = (jnp.ceil(steps * f(jnp.deg2rad(degrees)) - 0.5).astype(jnp.int32) for f in (jnp.sin, jnp.cos))
    height, width = layer.shape
    rows = jnp.clip(jnp.arange(height)[None] + down[:, None], 0, height - 1)
    columns = jnp.clip(jnp.arange(width)[None] + right[:, None], 0, width - 1)
    return jnp.sum(weights[:, None, None] * layer[rows[:, :, None], columns[:, None, :]], 0)


def along(axis: int, matrix: np.ndarray, values: jax.Array) -> jax.Array:
    """A matrix times the values along one axis."""
    return jnp.moveaxis(jnp.tensordot(jnp.asarray(matrix), values, (1, axis), precision="highest"), 0, axis)
