"""All forms of the gathered convolution against a loop over its filters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.ops import conv, gathered

GROUPS, KEPT, CHANNELS, FILTERS = 4, 5, 8, 12


@functools.cache
def _case(size):
    """x, kernel, inputs, outputs and a cotangent of the output with stride 1."""
    numbers = np.random.default_rng(size)
    x, kernel, dy = (numbers.standard_normal(shape).astype(np.float32) for shape in (
        (2, 6, 5, CHANNELS), (size, size, KEPT, FILTERS), (2, 6, 5, FILTERS)))
    inputs = np.concatenate([np.sort(numbers.permutation(CHANNELS)[:KEPT]) for _ in range(GROUPS)]).astype(np.int32)
    return x, kernel, inputs, numbers.permutation(FILTERS).astype(np.int32), dy


def _dense(kernel, inputs, outputs):
    """By hand."""
    found = np.zeros((*kernel.shape[:2], CHANNELS, FILTERS), kernel.dtype)
    for channel, place in enumerate(outputs):
        group = place // (FILTERS // GROUPS)
        for j, read in enumerate(inputs[group * KEPT:(group + 1) * KEPT]):
            found[:, :, read, channel] = kernel[:, :, j, place]
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_the_dense_kernel(size):
    _, kernel, inputs, outputs, _ = _case(size)
    np.testing.assert_array_equal(gathered.dense_kernel(kernel, inputs, outputs, CHANNELS),
                                  _dense(kernel, inputs, outputs))


@pytest.mark.parametrize("form", gathered.FORMS)
@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 2)])
def test_every_form_has_the_values_and_gradients_of_the_dense_kernel(form, size, stride):
    """Values, gradients, and the gradient of a gradient's norm, as second-order training would take it."""
    x, kernel, inputs, outputs, dy = _case(size)
    dy = dy[:, ::stride, ::stride]

    def slopes(function, kernel):
        y, back = jax.vjp(function, x, kernel)
        second = jax.grad(lambda x: jnp.sum(jax.vjp(function, x, kernel)[1](dy * y)[0]**2))(x)
        return y, *back(dy), second

    y, dx, dk, second = jax.jit(lambda: slopes(
        lambda x, kernel: gathered.conv2d(x, kernel, inputs, outputs, stride, form), kernel))()
    dense = jax.jit(lambda: slopes(lambda x, kernel: conv.conv2d(x, kernel, stride), _dense(kernel, inputs, outputs)))()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, dense[0])
    close(dx, dense[1])
    close(second, dense[3], atol=1e-2)
    np.testing.assert_allclose(_dense(np.asarray(dk), inputs, outputs),
                               np.where(_dense(np.ones_like(dk), inputs, outputs), dense[2], 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filters, pixels, form", [
    (2, 1024, "dense"), (32, 64, "dense"), (64, 16, "split"), (64, 4, "products"), (8, 4, "products"), (2, 4, "dense")])
def test_what_is_fastest_on_cpu(filters, pixels, form):
    assert gathered.fastest(filters, pixels) == form


def test_what_is_fastest_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert {gathered.fastest(g, pixels) for g in (2, 64) for pixels in (4, 64)} == {"grouped"}


@pytest.mark.parametrize("change, said", [
    (dict(form="sparse"), "form is 'sparse': expected one of grouped"),
    (dict(inputs=np.arange(7)), r"does not fit inputs \(7,\)"), (dict(outputs=np.arange(3)), r"and outputs \(3,\)")])
def test_what_does_not_fit(change, said):
    x, kernel, inputs, outputs, _ = _case(3)
    with pytest.raises(ValueError, match=said):
        gathered.conv2d(**dict(x=x, kernel=kernel, inputs=inputs, outputs=outputs) | change)
