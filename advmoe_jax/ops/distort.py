"""Colours and sharpness of images changed, as Pillow does it, but without rounding to bytes in between.

x images (B, H, W, C) in [0, 1], of 1 or 3 channels; factor (B,), of each image its own, of which 1 changes nothing.
"""

import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue
_LEVELS = 256


def grey(x: jax.Array) -> jax.Array:
    """Brightness of every pixel, (B, H, W, 1)."""
    if x.shape[-1] != 3:
        return jnp.mean(x, -1, keepdims=True)
    return jnp.sum(x * jnp.asarray(_LUMA, x.dtype)[None, None, None], -1, keepdims=True)


def brightness(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from black."""
    return jnp.clip(x * _each(factor), 0, 1)


def contrast(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from the mean brightness of the image."""
    return _away(jnp.mean(grey(x), (1, 2, 3), keepdims=True), x, factor)


def saturation(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from each pixel's grey; one channel stays."""
    return _away(grey(x), x, factor) if x.shape[-1] == 3 else x


def sharpness(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from the mean of each pixel and its eight neighbours, in which it counts five times; the border stays."""
    height, width = x.shape[1:3]
    around = sum(x[:, i:height - 2 + i, j:width - 2 + j] for i in range(3) for j in range(3))
    smooth = (around + 4 * x[:, 1:-1, 1:-1]) / 13
    return _away(x.at[:, 1:-1, 1:-1].set(smooth), x, factor)


def autocontrast(x: jax.Array) -> jax.Array:
    """Each channel from 0 to 1; one of a single value stays."""
    low, high = jnp.min(x, (1, 2), keepdims=True), jnp.max(x, (1, 2), keepdims=True)
    return jnp.where(high > low, (x - low) / jnp.where(high > low, high - low, 1), x)


def equalize(x: jax.Array) -> jax.Array:
    """Each channel with about as many pixels of every one of 256 levels, to which it is rounded.

    A channel stays that has fewer than 255 pixels besides those of its largest level.
    """
    levels = jnp.round(x * (_LEVELS - 1)).astype(jnp.int32)
    shape = levels.shape
    levels = jnp.moveaxis(levels, -1, 1).reshape(shape[0] * shape[3], -1)  # (B C, H W)
    rows = jnp.arange(len(levels))[:, None]
    count = jnp.zeros((len(levels), _LEVELS), jnp.int32).at[rows, levels].add(1)
    step = (levels.shape[1] - count[rows[:, 0], jnp.max(levels, 1)])[:, None] // (_LEVELS - 1)
    below = jnp.cumsum(count, 1) - count
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), _LEVELS - 1)
    found = jnp.moveaxis(table[rows, levels].reshape(shape[0], shape[3], *shape[1:3]), 1, -1)
    changes = jnp.moveaxis(step.reshape(shape[0], shape[3], 1, 1), 1, -1) > 0
    return jnp.where(changes, found.astype(x.dtype) / (_LEVELS - 1), x)


def _away(origin: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(origin + _each(factor) * (x - origin), 0, 1)


def _each(factor: jax.Array) -> jax.Array:
    return factor[:, None, None, None]
