"""Augmentation on the device: uint8 batches in, float images in [0, 1] out."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
    """(B, H, W, C) uint8 -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def pad_crop_flip(key: jax.Array, images: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Random crops of zero-padded images, then random horizontal flips, each image with its own draw.

    Args:
        key: one key; image b uses draw b.
        images: (B, H, W, C) uint8.
        pad: pixels on every side; 0 for none.
        flip: whether to flip half of them.
    Returns:
        (B, H, W, C) uint8.
    """
    batch, height, width, _ = images.shape
    row_key, col_key, flip_key = jax.random.split(key, 3)
    if pad:
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        rows = jax.random.randint(row_key, (batch, 1), 0, 2 * pad + 1) + jnp.arange(height)[None]
        cols = jax.random.randint(col_key, (batch, 1), 0, 2 * pad + 1) + jnp.arange(width)[None]
        images = padded[jnp.arange(batch)[:, None, None], rows[:, :, None], cols[:, None, :]]
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images
