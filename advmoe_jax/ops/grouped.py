"""Convolutions of a plan in one Pallas launch: a grid over blocks, whose expert picks the filters that are fetched.

An implicit matrix product: for each of the k * k taps, the window of a block's images (T * H' * W', I) times the
filters of its expert (I, w), summed in float32. The blocks of a plan are sorted by expert, so that filters are fetched
when the expert changes and filters' gradients are summed where they lie.

Written for TPU: it lowers to Mosaic, and agrees with `ops.blocks` in interpret mode, which is how it runs elsewhere,
slowly. It was never compiled for a TPU to the end, nor timed on one, and the images of a block must fit into its vector
memory: at 32x32x64 those of 8 do not. This is why `model.dispatch=auto` does not take it. Arguments as in `ops.blocks`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from advmoe_jax.ops import conv as convs
from advmoe_jax.ops import plans
from advmoe_jax.ops.plans import Plan


def conv(kernels: jax.Array, x: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """(B, H / s, W / s, w)."""
    p = kernels.shape[1] // 2
    return plans.in_order(_conv(_gather(x, plan), kernels, plan.expert, plan.used, stride, ((p, p), (p, p))), plan)


def input_grad(kernels: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """(B, H, W, I), by `conv` of the dilated gradient with turned filters."""
    pads = convs.input_grad_pads(x.shape[1:3], dy.shape[1:3], kernels.shape[1], stride)
    dilated = lax.pad(_gather(dy, plan), jnp.zeros((), dy.dtype),
                      ((0, 0, 0),) * 2 + ((0, 0, stride - 1),) * 2 + ((0, 0, 0),))
    return plans.in_order(_conv(dilated, jax.vmap(convs.turned)(kernels), plan.expert, plan.used, 1, pads), plan)


def kernel_grad(kernels: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan, stride: int) -> jax.Array:
    """(E, k, k, I, w)."""
    found = _kernel_grad(_gather(x, plan), _gather(dy, plan), plan.expert, stride, kernels.shape[1], len(kernels))
    has_block = jnp.zeros(len(kernels), bool).at[plan.expert].set(True)
    return jnp.where(has_block[:, None, None, None, None], found, 0)


def gate_grad(starts: tuple[int, ...], kernels: jax.Array, stored: jax.Array, x: jax.Array, dy: jax.Array, plan: Plan,
              stride: int) -> jax.Array:
    """(B, E), by one convolution with all stored filters."""
    y, width = convs.conv2d(x, stored, stride), kernels.shape[-1]
    products = jnp.stack([jnp.sum(y[..., start:start + width] * dy, (1, 2, 3)) for start in starts], 1)
    taken = plan.expert[plan.place // plan.image.shape[1]]
    return products * (1 - jax.nn.one_hot(taken, len(starts), dtype=dy.dtype))


def _gather(x, plan):
    """(n, T, H, W, C), fillers zero."""
    return jnp.where((plan.image < len(x))[..., None, None, None], x[plans.rows(plan)], 0)


def _phases(x, k, stride, pads):
    """The windows of all taps as contiguous slices: (n, T, s, s, H'', W'', C), and H', W'."""
    x = jnp.pad(x, ((0, 0), (0, 0), *pads, (0, 0)))
    out = [(size - k) // stride + 1 for size in x.shape[2:4]]
    need = [(o + (k - 1) // stride) * stride for o in out]
    x = jnp.pad(x, ((0, 0), (0, 0), *((0, max(0, n - size)) for n, size in zip(need, x.shape[2:4])), (0, 0)))
    x = x[:, :, :need[0], :need[1]]
    n, t, height, width, channels = x.shape
    x = x.reshape(n, t, height // stride, stride, width // stride, stride, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6), out


def _window(ref, tap, stride, out):
    """(T * H' * W', I) inputs of a tap (i, j)."""
    (i, j), (height, width) = tap, out
    x = ref[0, :, i % stride, j % stride, i // stride:i // stride + height, j // stride:j // stride + width, :]
    return x.reshape(-1, x.shape[-1])


def _sum_type(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _taps(k):
    return [(i, j) for i in range(k) for j in range(k)]


def _tile(width):
    """Channels of a launch's step: whole lanes where there are several."""
    return 128 if width % 128 == 0 else width


@functools.partial(jax.jit, static_argnames=("stride", "pads"))
def _conv(x, kernels, expert, used, stride, pads):
    """(n, T, H, W, I), (E, k, k, I, w), (n,), (n,) -> (n, T, H', W', w), undefined where a block is not used."""
    k, width = kernels.shape[1], kernels.shape[-1]
    x, out = _phases(x, k, stride, pads)
    tile = _tile(width)

    def body(_, used_ref, x_ref, kernel_ref, y_ref):
        @pl.when(used_ref[pl.program_id(0)] > 0)
        def _():
            total = sum(jnp.dot(_window(x_ref, tap, stride, out), kernel_ref[0, tap[0], tap[1]],
                                preferred_element_type=_sum_type(x)) for tap in _taps(k))
            y_ref[0] = total.astype(y_ref.dtype).reshape(y_ref.shape[1:])

    return pl.pallas_call(
        body, grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(len(x), width // tile),
            in_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda b, c, *_: (b, *[0] * 6)),
                      pl.BlockSpec((1, *kernels.shape[1:4], tile), lambda b, c, expert, _: (expert[b], 0, 0, 0, c))],
            out_specs=pl.BlockSpec((1, x.shape[1], *out, tile), lambda b, c, *_: (b, 0, 0, 0, c))),
        out_shape=jax.ShapeDtypeStruct((*x.shape[:2], *out, width), x.dtype),
        interpret=jax.default_backend() != "tpu")(expert, used.astype(jnp.int32), x, kernels)


@functools.partial(jax.jit, static_argnames=("stride", "k", "num_experts"))
def _kernel_grad(x, dy, expert, stride, k, num_experts):
    """(n, T, H, W, I), (n, T, H', W', w), (n,) -> (E, k, k, I, w); what experts without a block hold is undefined."""
    channels, width = x.shape[-1], dy.shape[-1]
    x, out = _phases(x, k, stride, ((k // 2, k // 2),) * 2)
    tile = _tile(width)

    def body(expert_ref, x_ref, dy_ref, grad_ref):
        b = pl.program_id(1)

        @pl.when((b == 0) | (expert_ref[b] != expert_ref[jnp.maximum(b, 1) - 1]))
        def _():
            grad_ref[...] = jnp.zeros_like(grad_ref)

        y = dy_ref[0].reshape(-1, tile)
        for i, j in _taps(k):
            grad_ref[0, i, j] += jnp.dot(_window(x_ref, (i, j), stride, out).T, y,
                                         preferred_element_type=_sum_type(x))

    return pl.pallas_call(
        body, grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(width // tile, len(x)),
            in_specs=[pl.BlockSpec((1, *x.shape[1:]), lambda c, b, expert: (b, *[0] * 6)),
                      pl.BlockSpec((1, *dy.shape[1:4], tile), lambda c, b, expert: (b, 0, 0, 0, c))],
            out_specs=pl.BlockSpec((1, k, k, channels, tile), lambda c, b, expert: (expert[b], 0, 0, 0, c))),
        out_shape=jax.ShapeDtypeStruct((num_experts, k, k, channels, width), _sum_type(x)),
        interpret=jax.default_backend() != "tpu")(expert, x, dy).astype(x.dtype)
