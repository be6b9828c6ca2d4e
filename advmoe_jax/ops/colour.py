"""8-bit images, and their hue, lightness and saturation as OpenCV has them.

Bytes are float32 whole numbers, 0 to 255; a hue is in units of 2 degrees, 0 to 180. A lightness of k + 1/2 is rounded
up; OpenCV rounds it down in one case of six, after its sums of float32 fractions.
"""

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import UserError


def to_bytes(x: jax.Array) -> jax.Array:
    """Images in [0, 1] -> bytes, rounded down."""
    # 255 * (k / 255) may come out below k.
    return jnp.floor(255 * x + 1e-3)


def as_rgb(x: jax.Array) -> jax.Array:
    """Images (..., 1) or (..., 3) -> (..., 3).

    Raises:
        UserError: another number of channels.
    """
    if x.shape[-1] not in (1, 3):
        raise UserError(f"images have {x.shape[-1]} channels: expected 1 or 3")
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))


def to_hls(rgb: jax.Array) -> jax.Array:
    """(..., 3) bytes -> (..., 3): hue, lightness and saturation, bytes too; grey has hue 0."""
    r, g, b = jnp.moveaxis(rgb, -1, 0)
    high, low = jnp.max(rgb, -1), jnp.min(rgb, -1)
    spread, total = high - low, high + low
    safe = jnp.where(spread > 0, spread, 1)
    hue = jnp.where(high == r, 60 * (g - b) / safe,
                    jnp.where(high == g, 120 + 60 * (b - r) / safe, 240 + 60 * (r - g) / safe))
    saturation = 255 * spread / jnp.maximum(jnp.where(total < 255, total, 510 - total), 1)
    half_hue = jnp.where(spread > 0, hue % 360, 0) / 2
    return jnp.stack([jnp.round(half_hue), jnp.ceil(total / 2), jnp.round(saturation)], -1)


def to_rgb(hls: jax.Array) -> jax.Array:
    """What `to_hls` gives -> (..., 3) bytes."""
    hue, lightness, saturation = jnp.moveaxis(hls, -1, 0)
    reach = saturation / 255 * jnp.minimum(lightness, 255 - lightness)

    def channel(place):
        k = (place + hue / 15) % 12
        return lightness - reach * jnp.clip(jnp.minimum(k - 3, 9 - k), -1, 1)

    return jnp.round(jnp.stack([channel(place) for place in (0, 8, 4)], -1))
