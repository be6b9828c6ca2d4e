"""Images turned, moved and sheared."""

import jax
import jax.numpy as jnp


def warp(x: jax.Array, degrees: jax.Array, shift: jax.Array, bilinear: bool) -> jax.Array:
    """Turns images about their centre and then moves them, read once; what comes from outside is 0.

    Args:
        x: (B, H, W, C).
        degrees: (B,) counter-clockwise.
        shift: (B, 2) pixels down and to the right.
        bilinear: whether to interpolate; else the nearest pixel is taken.
    """
    return jax.vmap(lambda *row: _warp(*row, bilinear))(x, degrees, shift)


def shear(x: jax.Array, slopes: jax.Array) -> jax.Array:
    """Shears images about their centre; the nearest pixel is taken, and 0 from outside.

    Args:
        x: (B, H, W, C).
        slopes: (B, 2), pixels that a row moves to the right for each that it lies below the centre, and a column down
            for each that it lies to the right.
    """
    return jax.vmap(_shear)(x, slopes)


def _shear(x, slopes):
    down, right = (jnp.arange(size, dtype=x.dtype) - (size - 1) / 2 for size in x.shape[:2])
    row, column = jnp.meshgrid(*(jnp.arange(size, dtype=x.dtype) for size in x.shape[:2]), indexing="ij")
    return _at(x, jnp.round(row - slopes[1] * right[None]), jnp.round(column - slopes[0] * down[:, None]))


def _warp(x, degrees, shift, bilinear):
    height, width, _ = x.shape
    middle = (height - 1) / 2, (width - 1) / 2
    down = jnp.arange(height, dtype=x.dtype)[:, None] - middle[0] - shift[0]
    right = jnp.arange(width, dtype=x.dtype)[None, :] - middle[1] - shift[1]
    sine, cosine = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))
    row, column = middle[0] + cosine * down + sine * right, middle[1] + cosine * right - sine * down
    if not bilinear:
        return _at(x, jnp.round(row), jnp.round(column))
    top, left = jnp.floor(row), jnp.floor(column)
    below, beyond = row - top, column - left
    return sum((weight_down * weight_right)[..., None] * _at(x, top + i, left + j)
               for i, weight_down in enumerate((1 - below, below))
               for j, weight_right in enumerate((1 - beyond, beyond)))


def _at(x, row, column):
    """The pixels (H, W, C) at whole positions (H, W)."""
    inside = (row >= 0) & (row <= x.shape[0] - 1) & (column >= 0) & (column <= x.shape[1] - 1)
    return jnp.where(inside[..., None], x[row.astype(jnp.int32), column.astype(jnp.int32)], 0)
