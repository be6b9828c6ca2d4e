"""Grouped convolution whose groups each read input channels of their own: what grouped-kernel pruning leaves.

A filter reads m of the I input channels, and the g = O / n filters of a group read the same ones (TMI-GKP, ICLR 2022;
SR-GKP, NeurIPS 2023). Stored are the weights that are left, (k, k, m, O), the filters of a group side by side; which
channels each group reads; and where each output channel stands among the filters.

Accelerators run XLA's grouped convolution. On CPU it is up to fifty times slower than a dense one, and narrow groups
run far below the rate of wide ones: there, few filters a group are computed with the zeros of the dense kernel.

B batch, H W height and width, I input channels, O output channels, n groups, k odd kernel size, s stride.
"""

import jax
import jax.numpy as jnp
from jax import lax

from advmoe_jax.ops import conv

FORMS = ("grouped", "split", "products", "dense")
FEW = 4
"""Pixels of an image, H * W, so few that patches are faster on CPU; XLA's convolution of 2 x 2 pixels is very slow."""
_NARROW, _WIDE = 8, 64  # filters of a group from which on, on CPU, patches of few pixels and "split" are faster


def conv2d(x: jax.Array, kernel: jax.Array, inputs: jax.Array, outputs: jax.Array, stride: int = 1,
           form: str | None = None) -> jax.Array:
    """The convolution, with zero padding of k // 2 on every side.

    Forward-mode differentiation is not defined; reverse mode is.

    Args:
        x: (B, H, W, I).
        kernel: (k, k, m, O) with odd k; filters t * g to (t + 1) * g are those of group t.
        inputs: (n * m,) integers, the channels that each group reads, one group after the other; within a group each
            stands once.
        outputs: (O,) integers, the filter that gives each output channel: a permutation.
        stride: in both directions.
        form: how it is computed, one of FORMS; None: what is fastest here, see `fastest`.
            "grouped": XLA's grouped convolution.
            "split": a convolution for each group.
            "products": a matrix product over patches for each group.
            "dense": a convolution with `dense_kernel`, which has zeros.
    Returns:
        (B, ceil(H / s), ceil(W / s), O).
    """
    k, _, kept, filters = kernel.shape
    groups = inputs.shape[0] // kept
    if (k % 2 == 0 or kernel.shape[1] != k or inputs.shape != (groups * kept,) or not groups or filters % groups
            or outputs.shape != (filters,)):
        raise ValueError(f"kernel {kernel.shape} does not fit inputs {inputs.shape} and outputs {outputs.shape}: "
                         "expected (k, k, m, O) with odd k, (n * m,) and (O,), where n divides O")
    form = form or fastest(filters // groups, x.shape[1] * x.shape[2])
    if form not in FORMS:
        raise ValueError(f"form is {form!r}: expected one of {', '.join(FORMS)}")
    if form == "dense":
        return conv.conv2d(x, dense_kernel(kernel, inputs, outputs, x.shape[-1]), stride)
    x = _gathered(x, inputs, _readers(inputs.reshape(groups, kept), x.shape[-1]))
    if form == "grouped":
        y = lax.conv_general_dilated(x, kernel, (stride, stride), ((k // 2, k // 2),) * 2,
                                     dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
    else:
        of_group = conv.patches_conv2d if form == "products" else conv.conv2d
        parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1))
        y = jnp.concatenate([of_group(channels, part, stride) for channels, part in parts], -1)
    return _gathered(y, outputs, _inverse(outputs)[:, None])


def fastest(filters: int, pixels: int) -> str:
    """The form that this platform computes fastest.

    Args:
        filters: g.
        pixels: H * W.
    """
    if jax.default_backend() != "cpu":
        return "grouped"
    if pixels <= FEW and filters >= _NARROW:
        return "products"
    return "split" if filters >= _WIDE else "dense"


def dense_kernel(kernel: jax.Array, inputs: jax.Array, outputs: jax.Array, channels: int) -> jax.Array:
    """(k, k, I, O): the dense kernel of the same convolution, with zeros where a filter does not read a channel.

    Args:
        kernel, inputs, outputs: as of `conv2d`.
        channels: I.
    """
    kept, filters = kernel.shape[2:]
    read = inputs.reshape(-1, kept)
    places, of_group = _places(read, channels), filters // len(read)
    return _spread(kernel, places[outputs // of_group].T, outputs, jnp.repeat(read, of_group, 0).T, _inverse(outputs))


def _places(read: jax.Array, channels: int) -> jax.Array:
    """(n, I): where each channel stands among the (n, m) that a group reads; m if it is none of them."""
    groups, kept = read.shape
    return jnp.full((groups, channels), kept, jnp.int32).at[jnp.arange(groups)[:, None], read].set(
        jnp.arange(kept, dtype=jnp.int32)[None])


def _readers(read: jax.Array, channels: int) -> jax.Array:
    """(I, n): where each channel stands among the n * m that all groups read; n * m for groups that do not read it."""
    groups, kept = read.shape
    places = _places(read, channels)
    return jnp.where(places < kept, places + kept * jnp.arange(groups, dtype=jnp.int32)[:, None], groups * kept).T


def _inverse(permutation: jax.Array) -> jax.Array:
    count = len(permutation)
    return jnp.zeros(count, jnp.int32).at[permutation].set(jnp.arange(count, dtype=jnp.int32))


@jax.custom_vjp
def _gathered(x, channels, back):
    """x[..., channels]. `back`, (I, r), says where each channel of x went; behind the last for none: so the gradient
    is a gather too, not a scatter, which is slow."""
    del back
    return jnp.take(x, channels, axis=-1, mode="clip")


def _gathered_bwd(back, slope):
    padded = jnp.pad(slope, ((0, 0),) * 3 + ((0, 1),))
    return jnp.sum(jnp.take(padded, back, axis=-1, mode="clip"), -1), None, None


_gathered.defvjp(lambda x, channels, back: (_gathered(x, channels, back), back), _gathered_bwd)


@jax.custom_vjp
def _spread(kernel, places, outputs, read, order):
    """The dense kernel: its entry (i, o) is entry (places[i, o], outputs[o]) of a kernel with zeros behind the last
    channel. `read` and `order` say where the kernel's entries went, for a gradient without scatter."""
    del read, order
    return jnp.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, places, outputs[None]]


_spread.defvjp(lambda *args: (_spread(*args), args[3:]),
               lambda saved, slope: (slope[:, :, saved[0], saved[1][None]], None, None, None, None))
