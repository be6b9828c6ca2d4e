"""Convolutions of a plan, block after block: each gathers its images, computes while they are in cache, and the
outputs are put back in the order of the batch, so that no filler is seen by a BatchNorm, a residual or a router.

For CPU; on an accelerator a loop over blocks keeps most of it idle. B batch, H W height and width, I input channels,
w channels of an expert, k kernel size, E experts, n blocks of T images, s stride.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from advmoe_jax.ops import plans
from advmoe_jax.ops.conv import conv2d
from advmoe_jax.ops.plans import Plan


def conv(kernels: jax.Array, x: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """Every image through the filters of its expert.

    Args:
        kernels: (E, k, k, I, w).
        x: (B, H, W, I).
        plan: of the B images.
        stride: s.
    Returns:
        (B, H / s, W / s, w).
    """
    return each(lambda rows, expert: conv2d(x[rows], kernels[expert], stride), plan)


def input_grad(kernels: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """The gradient of `conv` to x, given that to its output."""
    def block(rows, expert):
        pull = jax.vjp(lambda u: conv2d(u, kernels[expert], stride), x[rows])[1]
        return pull(dy[rows])[0]

    return each(block, plan)


def kernel_grad(kernels: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """The gradient of `conv` to the kernels, given that to its output."""
    def block(total, inputs):
        rows, real, expert, used = inputs

        def add(total):
            pull = jax.vjp(lambda k: conv2d(x[rows], k, stride), kernels[expert])[1]
            return total.at[expert].add(pull(jnp.where(real[:, None, None, None], dy[rows], 0))[0])

        return jax.lax.cond(used, add, lambda total: total, total), None

    inputs = plans.rows(plan), plan.image < len(x), plan.expert, plan.used
    return jax.lax.scan(block, jnp.zeros_like(kernels), inputs)[0]


def gate_grad(starts: tuple[int, ...], kernels: jax.Array, stored: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan,
              stride: int) -> jax.Array:
    """The product of the gradient to the output with the outputs of the experts that an image did not take.

    Each of them is computed alone, or all stored channels at once if they are fewer.

    Args:
        starts: first channel of each expert.
        kernels, x, dy, plan, stride: as `kernel_grad`.
        stored: (k, k, I, C) filters of all experts.
    Returns:
        (B, E), 0 for the expert that was taken.
    """
    num_experts, width = len(starts), kernels.shape[-1]
    alone = (num_experts - 1) * width <= stored.shape[-1]

    def product(y, dy):
        return jnp.sum(y * dy, (1, 2, 3))[:, None]

    def block(rows, expert):
        u, v = x[rows], dy[rows]
        if alone:
            others = [(expert + i) % num_experts for i in range(1, num_experts)]
            return sum(jax.nn.one_hot(e, num_experts, dtype=v.dtype)[None] * product(conv2d(u, kernels[e], stride), v)
                       for e in others)
        y = conv2d(u, stored, stride)
        products = jnp.concatenate([product(y[..., start:start + width], v) for start in starts], 1)
        return products * (1 - jax.nn.one_hot(expert, num_experts, dtype=v.dtype))[None]

    return each(block, plan)


def each(function: Callable[[jax.Array, jax.Array], jax.Array], plan: Plan) -> jax.Array:
    """`function` of the rows (T,) and the expert () of every block that is used, in the order of the batch.

    Args:
        function: (rows, expert) -> (T, ...), each row of which depends on no other.
        plan: of the B images.
    Returns:
        (B, ...).
    """
    arguments = plans.rows(plan), plan.expert
    shape = jax.eval_shape(function, *(a[0] for a in arguments))

    def block(inputs):
        used, arguments = inputs
        return jax.lax.cond(used, function, lambda *_: jnp.zeros(shape.shape, shape.dtype), *arguments)

    found = jax.lax.map(block, (plan.used, arguments))
    return found.reshape(-1, *found.shape[2:])[plan.place]
