"""Norm balls intersected with the image box [0, 1]: steps, starts and projections.

x clean images (B, H, W, C) in [0, 1]; eps in pixel units; d = H * W * C coordinates; keys (B,).
Every function treats each example alone, so that a result does not depend on the batch.
"""

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import one_of

NORMS = ("linf", "l2", "l1")
SHARE = 0.01
"""Of the coordinates, that an l1 step of SLIDE moves."""


def norm(delta: jax.Array, kind: str) -> jax.Array:
    """Size of each perturbation, (B, H, W, C) -> (B,)."""
    flat = delta.reshape(delta.shape[0], -1)
    if kind == "linf":
        return jnp.max(jnp.abs(flat), -1)
    return jnp.sqrt(jnp.sum(flat**2, -1)) if kind == "l2" else jnp.sum(jnp.abs(flat), -1)


def _column(value: jax.Array) -> jax.Array:
    return value[:, None, None, None]


def project(x_adv: jax.Array, x: jax.Array, eps: float | jax.Array, kind: str) -> jax.Array:
    """The nearest allowed images: within eps of x and in [0, 1].

    Exact for linf and l1. For l2 the ball comes first and the box after: feasible, since clipping towards x
    never lengthens a perturbation. eps = 0 returns x bit for bit.
    """
    one_of("norm", kind, NORMS)
    if kind == "linf":
        return jnp.clip(jnp.clip(x_adv, x - eps, x + eps), 0, 1)
    if kind == "l2":
        delta = x_adv - x
        size = jnp.maximum(norm(delta, "l2"), 1e-12)
        return jnp.clip(x + delta * _column(jnp.minimum(1, eps / size)), 0, 1)
    return _project_l1(x_adv, x, eps)


def _project_l1(x_adv: jax.Array, x: jax.Array, eps: float | jax.Array) -> jax.Array:
    """Exact projection on the l1 ball and the box (Croce & Hein, "Mind the box", ICML 2021).

    The solution is clip(sign(v) * max(|v| - lam, 0), -x, 1 - x) with v = x_adv - x, lam >= 0 the root of its l1
    norm minus eps: 50 bisections, keeping the end that meets the constraint from below.
    """
    v = x_adv - x

    def at(lam):
        return jnp.clip(jnp.sign(v) * jnp.maximum(jnp.abs(v) - _column(lam), 0), -x, 1 - x)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        outside = norm(at(middle), "l1") > eps
        return jnp.where(outside, middle, low), jnp.where(outside, high, middle)

    zero = jnp.zeros(v.shape[0], v.dtype)
    low, high = jax.lax.fori_loop(0, 50, halve, (zero, norm(v, "linf")))
    inside = norm(at(zero), "l1") <= eps
    return jnp.where(_column(inside), jnp.clip(x_adv, 0, 1), x + at(high) * (1 - 1e-6))


def normalized(v: jax.Array) -> jax.Array:
    """Each row over its l2 norm, (B, H, W, C) -> (B, H, W, C); a row of zeros stays."""
    # A subnormal gradient squares to 0: scale it before it is normalised.
    largest = _column(norm(v, "linf"))
    scaled = v / jnp.where(largest > 0, largest, 1)
    return scaled / jnp.maximum(_column(norm(scaled, "l2")), 1e-12)


def moved(x_adv: jax.Array, x: jax.Array) -> jax.Array:
    """How many coordinates differ, (B, H, W, C) -> (B,) floats."""
    return jnp.sum(x_adv != x, axis=(1, 2, 3)).astype(x.dtype)


def sparse_sign(grad: jax.Array, share: jax.Array) -> jax.Array:
    """Signs of the largest coordinates over their number, for a step of l1 size 1.

    Args:
        grad: (B, H, W, C).
        share: (B,) of the coordinates to keep; those as large as the smallest of them are kept too.
    """
    size = jnp.abs(grad).reshape(grad.shape[0], -1)
    d = size.shape[-1]
    place = jnp.clip(((1 - share) * d).astype(jnp.int32), 0, d - 1)
    threshold = jnp.take_along_axis(jnp.sort(size, -1), place[:, None], -1)
    sign = jnp.where(size >= threshold, jnp.sign(grad.reshape(size.shape)), 0)
    return (sign / (jnp.sum(jnp.abs(sign), -1, keepdims=True) + 1e-10)).reshape(grad.shape)


def random_start(key: jax.Array, x: jax.Array, eps: float | jax.Array, kind: str) -> jax.Array:
    """Uniform in the eps ball around x, then projected on the box.

    Args:
        key: (B,) keys, one per example.
    """
    shape = x.shape[1:]
    if kind == "linf":
        noise = jax.vmap(lambda k: jax.random.uniform(k, shape, x.dtype, -1, 1))(key)
        return project(x + eps * noise, x, eps, kind)
    d = x[0].size

    def draw(k):
        direction, radius = jax.random.split(k)
        if kind == "l2":
            v = jax.random.normal(direction, shape, x.dtype)
            return v / jnp.linalg.norm(v.ravel()) * jax.random.uniform(radius, dtype=x.dtype) ** (1 / d)
        v = jax.random.laplace(direction, shape, x.dtype)
        return v / jnp.sum(jnp.abs(v)) * jax.random.uniform(radius, dtype=x.dtype) ** (1 / d)

    return project(x + eps * jax.vmap(draw)(key), x, eps, kind)


def steepest(grad: jax.Array, x_adv: jax.Array, kind: str, key: jax.Array, share: float = SHARE) -> jax.Array:
    """Direction of unit size that increases the loss most.

    linf: the sign. l2: the normalised gradient; where it vanishes, a random direction, since a dead gradient must
    not end an attack. l1: SLIDE (Tramer & Boneh, NeurIPS 2019): signs of the largest coordinates that can still move,
    divided by their number.

    Args:
        grad: (B, H, W, C).
        x_adv: current images, for what "can still move" means.
        key: (B,) keys.
        share: of the coordinates, that an l1 step moves.
    """
    if kind == "linf":
        return jnp.sign(grad)
    if kind == "l2":
        noise = jax.vmap(lambda k: jax.random.normal(k, grad.shape[1:], grad.dtype))(key)
        return normalized(jnp.where(_column(norm(grad, "linf")) > 0, grad, noise))
    stuck = ((x_adv <= 0) & (grad < 0)) | ((x_adv >= 1) & (grad > 0))
    size = jnp.where(stuck, 0, jnp.abs(grad)).reshape(grad.shape[0], -1)
    keep = max(1, round(share * size.shape[-1]))
    threshold = jax.lax.top_k(size, keep)[0][:, -1:]
    move = jnp.where((size >= threshold) & (size > 0), jnp.sign(grad.reshape(size.shape)), 0)
    return (move / jnp.maximum(jnp.sum(jnp.abs(move), -1, keepdims=True), 1)).reshape(grad.shape)
