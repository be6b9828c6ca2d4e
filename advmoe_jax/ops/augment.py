"""Augmentation on the device: uint8 batches in, float images in [0, 1] out."""

import jax
import jax.numpy as jnp

from advmoe_jax.ops import distort, warp


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


def jitter(key: jax.Array, x: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, then contrast, then saturation, each by an image's own factor, uniform in 1 - strength to
    1 + strength, as torchvision's ColorJitter does in random order.

    Args:
        key: one key; image b uses draw b.
        x: (B, H, W, C) in [0, 1]; those of one channel have no saturation.
        strength: 0 to 1.
    """
    factors = jax.random.uniform(key, (3, x.shape[0]), x.dtype, 1 - strength, 1 + strength)
    for change, factor in zip((distort.brightness, distort.contrast, distort.saturation), factors):
        x = change(x, factor)
    return x


def turn(key: jax.Array, x: jax.Array, degrees: float) -> jax.Array:
    """Turns each image about its centre by its own angle, uniform in -degrees to degrees; the nearest pixel is taken,
    and 0 from outside. Arguments as `jitter`."""
    angles = jax.random.uniform(key, x.shape[:1], x.dtype, -degrees, degrees)
    return warp.warp(x, angles, jnp.zeros((x.shape[0], 2), x.dtype), bilinear=False)


def mixup(key: jax.Array, x: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Images and soft labels mixed with those of another image of the batch; Zhang et al., ICLR 2018.

    The share of the image itself is drawn for each from Beta(alpha, alpha).

    Args:
        key: one key.
        x: (B, H, W, C).
        targets: (B, K).
        alpha: above 0.
    """
    order, share = jax.random.split(key)
    others = jax.random.permutation(order, x.shape[0])
    share = jax.random.beta(share, alpha, alpha, x.shape[:1], x.dtype)
    along = share[:, None, None, None]
    return along * x + (1 - along) * x[others], share[:, None] * targets + (1 - share[:, None]) * targets[others]


def cutmix(key: jax.Array, x: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Images with a rectangle of another image of the batch, and soft labels mixed by the pixels that each has; Yun et
    al., ICCV 2019.

    Of each image by itself a share is drawn from Beta(alpha, alpha). Height and width of the rectangle are those of the
    image times sqrt(1 - share), its centre is anywhere in the image, and what is outside is cut off.

    Args:
        key: one key.
        x: (B, H, W, C).
        targets: (B, K).
        alpha: above 0; 1 in the paper.
    """
    order, share, *centres = jax.random.split(key, 4)
    others = jax.random.permutation(order, x.shape[0])
    part = jnp.sqrt(1 - jax.random.beta(share, alpha, alpha, x.shape[:1], x.dtype))
    rows, columns = (_span(*of, part) for of in zip(centres, x.shape[1:3]))
    inside = rows[:, :, None] & columns[:, None, :]
    share = 1 - jnp.mean(inside, (1, 2), dtype=targets.dtype)[:, None]
    return jnp.where(inside[..., None], x[others], x), share * targets + (1 - share) * targets[others]


def _span(key, size, part):
    """(B, size) bool: an interval of so large a part (B,) of all pixels, about a random one, cut off at the borders."""
    length = jnp.floor(part * size).astype(jnp.int32)[:, None]
    return interval(size, jax.random.randint(key, length.shape, 0, size) - length // 2, length)


def interval(size: int, first: jax.Array, length: jax.Array) -> jax.Array:
    """(B, size) bool: which of so many pixels are among the `length` (B, 1) from `first` (B, 1) on."""
    place = jnp.arange(size)[None]
    return (place >= first) & (place < first + length)
