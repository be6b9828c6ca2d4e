"""Batch normalisation by the statistics of the batch, with a gradient written by hand.

Ioffe & Szegedy, ICML 2015. B batch, H W height and width, C channels.
"""

import jax
import jax.numpy as jnp
from jax import lax

EPSILON = 1e-5  # PyTorch's


def sum_pixels(x: jax.Array) -> jax.Array:
    """(B, ..., C) -> (B, C).

    On CPU a product with ones, which takes a quarter of the time of XLA's reduction and has a thirtieth of its error.
    """
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    if jax.default_backend() != "cpu":
        return jnp.sum(x, 1)
    return jnp.einsum("bn,bnc->bc", jnp.ones(x.shape[:2], x.dtype), x)


def scaled(x: jax.Array, mean: jax.Array, factor: jax.Array, bias: jax.Array) -> jax.Array:
    """(x - mean) * factor + bias, channel by channel: x (B, ..., C), the others (C,)."""
    mean, factor, bias = (v.reshape(*[1] * (x.ndim - 1), -1) for v in (mean, factor, bias))
    return (x - mean) * factor + bias


@jax.custom_vjp
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises every channel over the batch. Only the first result has a gradient; reverse mode alone is defined.

    Args:
        x: (B, ..., C).
        scale, bias: (C,).
    Returns:
        (B, ..., C) of mean `bias` and standard deviation `scale`, of x's type; mean and biased variance (C,) of x, of
        float32 or more.
    """
    return _forward(x, scale, bias)[0]


def _forward(x, scale, bias):
    u = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, square = _mean(u), _mean(u * u)
    var = jnp.maximum(square - mean * mean, 0)
    inverse = lax.rsqrt(var + EPSILON)
    y = scaled(u, mean, inverse * scale, bias).astype(x.dtype)
    return (y, mean, var), (x, scale, bias, mean, inverse)


def _backward(saved, cotangents):
    x, scale, bias, mean, inverse = saved
    u, dy = (v.astype(mean.dtype) for v in (x, cotangents[0]))
    dy_mean, dy_x_mean = _mean(dy), _mean(dy * u)
    slope = (dy_x_mean - mean * dy_mean) * inverse
    through = scaled(u, mean, inverse * slope, dy_mean)  # what the statistics take away
    zero, count = jnp.zeros_like(mean), x.size // x.shape[-1]
    dx = scaled(dy - through, zero, inverse * scale, zero)
    return dx.astype(x.dtype), (slope * count).astype(scale.dtype), (dy_mean * count).astype(bias.dtype)


normalize.defvjp(_forward, _backward)


def _mean(x):
    return jnp.sum(sum_pixels(x), 0) / (x.size // x.shape[-1])
