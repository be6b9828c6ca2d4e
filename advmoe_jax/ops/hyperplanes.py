"""The shortest way from an image to a hyperplane inside the box [0, 1].

x images (B, d) flattened, w normals (B, d), b offsets (B,): the planes are {u: <w, u> = b}.
"""

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import one_of
from advmoe_jax.ops.balls import NORMS

_MOST_STEPS = 60


def distance(gap: jax.Array, normal: jax.Array, kind: str) -> jax.Array:
    """Distance |gap| / |normal|, in the dual norm, to the plane {x + v: <normal, v> = gap}, box aside.

    It does not depend on a factor that both have, however small or large. Where the normal is 0 it is infinite.

    Args:
        gap: (...).
        normal: (..., d).
        kind: norm of the distance.
    """
    largest = jnp.max(jnp.abs(normal), -1)
    scale = jnp.where(largest > 0, largest, 1)
    unit = jnp.abs(normal / scale[..., None])
    length = {"linf": jnp.sum, "l1": jnp.max, "l2": lambda v, axis: jnp.sqrt(jnp.sum(v**2, axis))}[kind](unit, -1)
    return jnp.where(largest > 0, jnp.abs(gap) / scale / jnp.where(largest > 0, length, 1), jnp.inf)


def displacement(x: jax.Array, w: jax.Array, b: jax.Array, kind: str) -> jax.Array:
    """The perturbation (B, d) of least norm that brings x to its plane without leaving the box.

    Where the box does not meet the plane, as far towards it as the box allows. Croce & Hein, "Minimally distorted
    adversarial examples with a fast adaptive boundary attack", ICML 2020, eq. 3.

    For linf and l2 coordinate i moves by min(t, room_i) or min(t |w_i|, room_i) with one t for all: what is still
    missing is a convex falling function of t, linear in pieces, whose root Newton's method reaches from the left
    without passing it. For l1 the coordinates of largest |w| move as far as they can, the last of them partly.
    """
    one_of("norm", kind, NORMS)
    missing = jnp.sum(w * x, -1) - b
    side = jnp.where(missing >= 0, 1.0, -1.0).astype(x.dtype)
    missing = jnp.abs(missing)
    size = jnp.abs(w)
    towards = -side[:, None] * jnp.sign(w)
    room = jnp.where(size > 0, jnp.where(towards > 0, 1 - x, x), 0)
    far = _fill(size, room, missing) if kind == "l1" else _stretch(size, room, missing, kind)
    return towards * far


def _stretch(size, room, missing, kind):
    """How far each coordinate moves for linf and l2."""
    speed = jnp.ones_like(size) if kind == "linf" else size / jnp.maximum(jnp.max(size, -1, keepdims=True), 1e-30)
    gain = size * speed

    def far(t):
        return jnp.minimum(t[:, None] * speed, room)

    def goes_on(state):
        i, _, going = state
        return (i < _MOST_STEPS) & jnp.any(going)

    def newton(state):
        i, t, going = state
        left = missing - jnp.sum(size * far(t), -1)
        slope = jnp.sum(jnp.where(t[:, None] * speed < room, gain, 0), -1)
        step = jnp.where(going & (slope > 0), left / jnp.where(slope > 0, slope, 1), 0)
        further = t + jnp.maximum(step, 0)
        return i + 1, further, going & (further > t)

    t = jnp.zeros_like(missing)
    _, t, _ = jax.lax.while_loop(goes_on, newton, (0, t, jnp.ones(t.shape, bool)))
    return far(t)


def _fill(size, room, missing):
    """How far each coordinate moves for l1."""
    order = jnp.argsort(-size, -1)
    largest = jnp.take_along_axis(size, order, -1)
    gain = largest * jnp.take_along_axis(room, order, -1)
    before = jnp.cumsum(gain, -1) - gain
    left = jnp.maximum(missing[:, None] - before, 0)
    share = jnp.where(gain > 0, jnp.minimum(left / jnp.where(gain > 0, gain, 1), 1), 0)
    back = jnp.argsort(order, -1)
    return jnp.take_along_axis(share, back, -1) * room
