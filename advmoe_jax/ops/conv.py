"""The convolution of the package: one layout, gradients that run at full speed inside loops.

B batch, H W height and width, I input channels, O output channels, k odd kernel size, s stride.

Accelerators run XLA's own convolution and its gradients. XLA on CPU runs convolutions in other layouts than
NHWC/HWIO/NHWC many times slower inside scan, while and cond bodies (jax issue 12868). The gradients that autodiff makes
are of that kind, so they are written here as convolutions in the canonical layout. The stem, with 3 channels or fewer,
is a matrix product over patches: its input gradient, which every attack step needs, is several times faster so. So are
the widest layers of deep networks, whose images have 2 x 2 pixels or fewer.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_NHWC = ("NHWC", "HWIO", "NHWC")
_PATCH_CHANNELS = 4  # at most this many input channels go through patches
_PATCH_PIXELS, _WIDE_CHANNELS = 4, 256  # and so do images of at most so many pixels, of so many channels or more


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution with zero padding of k // 2 on every side, as PyTorch's `padding=k // 2`.

    Forward-mode differentiation is not defined for k > 1 on CPU; reverse mode is, to any order.

    Args:
        x: (B, H, W, I).
        kernel: (k, k, I, O) with odd k.
        stride: in both directions.
    Returns:
        (B, ceil(H / s), ceil(W / s), O).
    """
    k = kernel.shape[0]
    if k % 2 == 0 or kernel.shape[1] != k or kernel.shape[2] != x.shape[-1]:
        raise ValueError(f"kernel {kernel.shape} does not fit {x.shape}: expected (k, k, {x.shape[-1]}, O) with odd k")
    if k == 1:
        return jnp.einsum("bhwi,io->bhwo", x[:, ::stride, ::stride], kernel[0, 0])
    if jax.default_backend() != "cpu":
        return _plain(x, kernel, stride)
    if x.shape[-1] <= _PATCH_CHANNELS or (
            x.shape[-1] >= _WIDE_CHANNELS and x.shape[1] * x.shape[2] <= _PATCH_PIXELS):
        return patches_conv2d(x, kernel, stride)
    return _conv(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def patches_conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """As `conv2d`, by a matrix product over patches: k * k times the memory of x, on CPU fastest when narrow."""
    return _by_patches(x, kernel, stride)


def _by_patches(x, kernel, stride):
    return patches(x, kernel.shape[0], stride) @ kernel.reshape(-1, kernel.shape[-1])


def _patches_fwd(x, kernel, stride):
    return _by_patches(x, kernel, stride), (x, kernel)


def _patches_bwd(stride, saved, dy):
    x, kernel = saved
    [dx] = jax.vjp(lambda x: _by_patches(x, kernel, stride), x)[1](dy)
    return dx, kernel_grad(x, dy, stride, kernel.shape[0])  # two to three times faster than by patches


patches_conv2d.defvjp(_patches_fwd, _patches_bwd)


def patches(x: jax.Array, k: int, stride: int) -> jax.Array:
    """(B, H', W', k * k * I) windows of x, ordered as a flattened (k, k, I) kernel."""
    _, height, width, _ = x.shape
    p = k // 2
    x = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    rows, cols = (height - 1) // stride * stride + 1, (width - 1) // stride * stride + 1
    return jnp.concatenate(
        [x[:, i:i + rows:stride, j:j + cols:stride] for i in range(k) for j in range(k)], axis=-1)


def _plain(x, kernel, stride):
    p = kernel.shape[0] // 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((p, p), (p, p)), dimension_numbers=_NHWC)


_conv = jax.custom_vjp(_plain, nondiff_argnums=(2,))


def _conv_fwd(x, kernel, stride):
    return _plain(x, kernel, stride), (x, kernel)


def _conv_bwd(stride, saved, dy):
    x, kernel = saved
    return input_grad(dy, turned(kernel), stride, x.shape), kernel_grad(x, dy, stride, kernel.shape[0])


def turned(kernel: jax.Array) -> jax.Array:
    """A kernel (k, k, I, O) as `input_grad` takes it: flipped in space, transposed in channels."""
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def input_grad(dy: jax.Array, turned: jax.Array, stride: int, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of `conv2d` to x, given that to its output: a convolution of the dilated cotangent.

    Args:
        dy: (B, H', W', O).
        turned: (k, k, O, I).
        stride: s.
        shape: (B, H, W, I) of x.
    """
    pads = input_grad_pads(shape[1:3], dy.shape[1:3], turned.shape[0], stride)
    return lax.conv_general_dilated(dy, turned, (1, 1), pads, lhs_dilation=(stride, stride), dimension_numbers=_NHWC)


def input_grad_pads(size: tuple[int, ...], out: tuple[int, ...], k: int, stride: int) -> tuple[tuple[int, int], ...]:
    """What `input_grad` pads the dilated cotangent with, (H', W') as `out`, to give (H, W) as `size`."""
    low = k - 1 - k // 2
    return tuple((low, full - ((short - 1) * stride + 1) - low + k - 1) for full, short in zip(size, out))


def kernel_grad(x: jax.Array, dy: jax.Array, stride: int, k: int) -> jax.Array:
    """The gradient of `conv2d` to its kernel, (k, k, I, O): a convolution of the images with the cotangents, the batch
    taking the part of the channels.

    Args:
        x: (B, H, W, I).
        dy: (B, H', W', O).
        stride: s.
        k: size of the kernel.
    """
    p = k // 2
    x, dy = lax.optimization_barrier((x, dy))  # what made them would be computed again while they are transposed
    pads = [(p, k - 1 - size - p + (out - 1) * stride + 1) for size, out in zip(x.shape[1:3], dy.shape[1:3])]
    grad = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), pads,
        rhs_dilation=(stride, stride), dimension_numbers=_NHWC)
    return grad.transpose(1, 2, 0, 3)


_conv.defvjp(_conv_fwd, _conv_bwd)
