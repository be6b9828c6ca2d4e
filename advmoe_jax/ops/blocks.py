"""Convolutions of a plan, block after block: each gathers its images, computes while they are in cache, and the
outputs are put back in the order of the batch, so that no filler is seen by a BatchNorm, a residual or a router.

They are compiled functions, so that layers of one shape are traced once. For CPU; on an accelerator a loop over blocks
keeps most of it idle.

B batch, H W height and width, I input channels, w channels of an expert, k kernel size, E experts, n blocks of T
images, s stride.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.ops import conv as convs
from advmoe_jax.ops import plans
from advmoe_jax.ops.plans import Plan


@functools.partial(jax.jit, static_argnames="stride")
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
    return _by_expert(kernels.__getitem__, lambda kernel, rows: convs.conv2d(x[rows], kernel, stride), plan)


@functools.partial(jax.jit, static_argnames="stride")
def input_grad(kernels: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """The gradient of `conv` to x, given that to its output."""
    def compute(turned, rows):
        return convs.input_grad(dy[rows], turned, stride, (*rows.shape, *x.shape[1:]))

    return _by_expert(lambda expert: convs.turned(kernels[expert]), compute, plan)


@functools.partial(jax.jit, static_argnames="stride")
def kernel_grad(kernels: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """The gradient of `conv` to the kernels, given that to its output."""
    rows, is_image = plans.rows(plan), plan.image < len(x)

    def of(expert, first, end, found):
        def add(i, total):
            real = jnp.where(is_image[i][:, None, None, None], dy[rows[i]], 0)
            return total + convs.kernel_grad(x[rows[i]], real, stride, kernels.shape[1])

        return found.at[expert].set(lax.fori_loop(first, end, add, jnp.zeros_like(kernels[0])))

    return _experts(of, jnp.zeros_like(kernels), plan)


@functools.partial(jax.jit, static_argnames=("starts", "stride"))
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

    def prepare(expert):
        others = [(expert + i) % num_experts for i in range(1, num_experts)] if alone else []
        return expert, [(jax.nn.one_hot(other, num_experts, dtype=dy.dtype), kernels[other]) for other in others]

    def compute(ready, rows):
        expert, others = ready
        u, v = x[rows], dy[rows]
        if alone:
            return sum(one_hot[None] * product(convs.conv2d(u, kernel, stride), v) for one_hot, kernel in others)
        y = convs.conv2d(u, stored, stride)
        products = jnp.concatenate([product(y[..., start:start + width], v) for start in starts], 1)
        return products * (1 - jax.nn.one_hot(expert, num_experts, dtype=v.dtype))[None]

    return _by_expert(prepare, compute, plan)


def _by_expert(prepare: Callable[[jax.Array], Any], compute: Callable[[Any, jax.Array], jax.Array], plan: Plan
               ) -> jax.Array:
    """(B, ...) of what `compute(prepare(expert), rows)`, (T,) -> (T, ...), gives for the rows of every block.

    What an expert needs is prepared once: XLA on CPU moves nothing out of a loop. No gradient is defined.
    """
    rows = plans.rows(plan)
    block = jax.eval_shape(lambda expert: compute(prepare(expert), rows[0]), plan.ends[0])

    def of(expert, first, end, found):
        ready = prepare(expert)
        return lax.fori_loop(first, end, lambda i, found: found.at[i].set(compute(ready, rows[i])), found)

    return plans.in_order(_experts(of, jnp.zeros((len(rows), *block.shape), block.dtype), plan), plan)


def _experts(of: Callable, found: jax.Array, plan: Plan) -> jax.Array:
    """`found` after `found = of(expert, first, end, found)` of every expert, whose blocks begin at `first`."""
    def step(expert, state):
        first, found = state
        end = plan.ends[expert]
        return end, of(expert, first, end, found)

    return lax.fori_loop(0, len(plan.ends), step, (jnp.zeros_like(plan.ends[0]), found))[1]


def pathways(compute: Callable[[jax.Array, jax.Array], jax.Array], plan: Plan) -> jax.Array:
    """`compute` of the rows (T,) and the expert () of every block that is used, in the order of the batch.

    Args:
        compute: (rows, expert) -> (T, ...), each row of which depends on no other. It may be differentiated.
        plan: of the B images.
    Returns:
        (B, ...).
    """
    arguments = plans.rows(plan), plan.expert
    shape = jax.eval_shape(compute, *(a[0] for a in arguments))

    def block(inputs):
        used, arguments = inputs
        return lax.cond(used, compute, lambda *_: jnp.zeros(shape.shape, shape.dtype), *arguments)

    found = lax.map(block, (plan.used, arguments))
    return plans.in_order(found, plan)
