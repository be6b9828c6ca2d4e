"""The convolution against XLA's own and against PyTorch's, values and gradients, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from advmoe_jax.ops.conv import conv2d

CHANNELS = (3, 5)  # 3 goes through patches, 5 does not
SIZES = ((7, 8), (8, 7))


def _case(k, stride, channels, size):
    rng = np.random.default_rng([k, stride, channels, *size])
    out = [-(-s // stride) for s in size]
    shapes = (2, *size, channels), (k, k, channels, 4), (2, *out, 4)
    return tuple(rng.standard_normal(shape) for shape in shapes)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _value_and_grads(function, x, kernel, cotangent, stride):
    y, pull = jax.vjp(lambda x, kernel: function(x, kernel, stride), x, kernel)
    return y, *pull(cotangent)


def _reference(x, kernel, stride):
    p = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((p, p), (p, p)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_values_and_gradients_are_those_of_xla(k, stride, channels, size):
    with jax.enable_x64(True):
        case = _case(k, stride, channels, size)
        for ours, theirs in zip(_value_and_grads(conv2d, *case, stride), _value_and_grads(_reference, *case, stride)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (2, 2)])
def test_small_images_of_many_channels(size):
    """They go through patches too."""
    with jax.enable_x64(True):
        case = _case(3, 1, 256, size)
        assert "conv_general_dilated" not in str(jax.make_jaxpr(conv2d)(*case[:2]))
        for ours, theirs in zip(_value_and_grads(conv2d, *case, 1), _value_and_grads(_reference, *case, 1)):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("channels", CHANNELS)
def test_accelerators_run_the_convolution_of_xla(channels, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 8, channels), (3, 3, channels, 4))]
    traces = [str(jax.make_jaxpr(jax.grad(lambda x, kernel, f=f: jnp.sum(f(x, kernel, 2)), (0, 1)))(*shapes))
              for f in (conv2d, _reference)]
    assert traces[0].count("conv_general_dilated") == traces[1].count("conv_general_dilated") and (
        "custom_vjp" not in traces[0])


@pytest.mark.parametrize("channels", CHANNELS)
def test_second_derivatives_are_those_of_xla(channels):
    def curvature(function, x, kernel):
        def grad_norm(kernel):
            return jnp.sum(jax.grad(lambda x: jnp.sum(function(x, kernel, 2)**3))(x)**2)
        return jax.grad(grad_norm)(kernel)

    with jax.enable_x64(True):
        x, kernel, _ = _case(3, 2, channels, (7, 8))
        ours, theirs = (jax.jit(curvature, static_argnums=0)(f, x, kernel) for f in (conv2d, _reference))
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)


@pytest.mark.parametrize("shape", [(2, 2, 5, 4), (3, 1, 5, 4), (3, 3, 4, 4)])
def test_refuses_kernels_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="does not fit"):
        conv2d(jnp.zeros((1, 8, 8, 5)), jnp.zeros(shape))


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_values_and_gradients_are_those_of_torch(k, stride, channels, size):
    torch = pytest.importorskip("torch")
    x, kernel, cotangent = case = _case(k, stride, channels, size)
    x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    conv = torch.nn.Conv2d(channels, 4, k, stride, k // 2, bias=False, dtype=torch.float64)
    conv.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1))
    y = conv(x)
    y.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    theirs = (y.detach().numpy().transpose(0, 2, 3, 1), x.grad.numpy().transpose(0, 2, 3, 1),
              conv.weight.grad.numpy().transpose(2, 3, 1, 0))
    with jax.enable_x64(True):
        for a, b in zip(_value_and_grads(conv2d, *case, stride), theirs):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)
