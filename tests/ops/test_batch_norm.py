"""Batch normalisation against flax's, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from advmoe_jax.models.layers import BatchNorm
from advmoe_jax.ops import batch_norm

SHAPES = [(6, 5, 4, 3), (7, 11), (4, 1, 1, 2)]


@pytest.fixture(autouse=True)
def _in_float64():
    with jax.enable_x64(True):
        yield


def _normal(seed, shape):
    return 3 + 2 * jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_affine", [True, False])
def test_values_statistics_and_gradients_are_those_of_flax(shape, is_affine):
    x, weights = _normal(0, shape), _normal(1, shape)
    ours = BatchNorm(is_affine)
    theirs = nn.BatchNorm(momentum=0.9, epsilon=1e-5, use_scale=is_affine, use_bias=is_affine, dtype=jnp.float64,
                          param_dtype=jnp.float64)
    seeds = itertools.count(2)
    variables = jax.tree.map(lambda leaf: _normal(next(seeds), leaf.shape), ours.init(jax.random.key(0), x, True))
    stats = jax.tree.map(jnp.abs, variables["batch_stats"])
    params = variables.get("params", {})

    def loss(apply, params, x):
        y, updated = apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return jnp.sum(weights * jnp.sin(y)), (y, updated["batch_stats"])

    def train(apply):
        return jax.value_and_grad(lambda *inputs: loss(apply, *inputs), argnums=(0, 1), has_aux=True)(params, x)

    ours_found = train(lambda v, x, **how: ours.apply(v, x, True, **how))
    theirs_found = train(lambda v, x, **how: theirs.apply(v, x, use_running_average=False, **how))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), ours_found, theirs_found)
    fixed = {"params": params, "batch_stats": stats}
    np.testing.assert_allclose(ours.apply(fixed, x, False), theirs.apply(fixed, x, use_running_average=True), 1e-12)


def test_passes_in_one_batch_are_those_one_after_the_other():
    passes, weights = (_normal(seed, (3, 5, 4, 2)) for seed in (0, 1))  # 3 passes over 5 images
    norm = BatchNorm()
    variables = jax.tree.map(lambda leaf: jnp.abs(_normal(2, leaf.shape)), norm.init(jax.random.key(0), passes[0], 1))

    def one_by_one(params, passes):
        total, stats = 0.0, variables["batch_stats"]
        for x, w in zip(passes, weights):
            y, updated = norm.apply({"params": params, "batch_stats": stats}, x, 1, mutable=["batch_stats"])
            total, stats = total + jnp.sum(w * jnp.sin(y)), updated["batch_stats"]
        return total, stats

    def at_once(params, passes):
        x = passes.swapaxes(0, 1).reshape(-1, *passes.shape[2:])
        y, updated = norm.apply(variables | {"params": params}, x, 3, mutable=["batch_stats"])
        return jnp.sum(weights.swapaxes(0, 1).reshape(x.shape) * jnp.sin(y)), updated["batch_stats"]

    ours, theirs = (jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(variables["params"], passes)
                    for f in (at_once, one_by_one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), ours, theirs)


def test_the_gradient_of_the_gradient():
    x, weights = _normal(0, (5, 3, 2)), _normal(1, (5, 3, 2))
    scale, bias = jnp.ones(2), jnp.zeros(2)

    def slope(normalize):
        def value(x):
            return jnp.sum(weights * jnp.sin(normalize(x)))
        return jax.grad(lambda x: jnp.sum(jax.grad(value)(x)**2))(x)

    def plainly(x):
        mean, var = (statistic(x, (0, 1), keepdims=True) for statistic in (jnp.mean, jnp.var))
        return (x - mean) / jnp.sqrt(var + batch_norm.EPSILON)

    plain = slope(plainly)
    np.testing.assert_allclose(slope(lambda x: batch_norm.normalize(x, scale, bias)[0]), plain, rtol=1e-8, atol=1e-9)


def test_half_precision_is_summed_in_single():
    x, scale, bias = (_normal(seed, shape).astype(jnp.bfloat16) for seed, shape in enumerate(((64, 8, 3), (3,), (3,))))
    (y, mean, var), pull = jax.vjp(batch_norm.normalize, x, scale, bias)
    exact = batch_norm.normalize(*(v.astype(jnp.float64) for v in (x, scale, bias)))
    assert y.dtype == jnp.bfloat16 and mean.dtype == var.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(jnp.float64), exact[0], rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose([mean, var], exact[1:], rtol=1e-5)
    grads = pull((y, jnp.zeros_like(mean), jnp.zeros_like(var)))
    assert all(grad.dtype == jnp.bfloat16 for grad in grads)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_over_pixels(shape):
    x = _normal(0, shape)
    np.testing.assert_allclose(batch_norm.sum_pixels(x), x.reshape(shape[0], -1, shape[-1]).sum(1), rtol=1e-13)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("devices", [1, 4])
def test_values_far_from_zero(passes, devices):
    """Mean 50, standard deviation 0.01: squares in float32 would hold nothing of the variance."""
    x, dy = (np.asarray(jax.random.normal(jax.random.key(seed), (24, 8, 8, 4))) for seed in (0, 1))
    x = np.float32(50 + 0.01 * x)
    place = NamedSharding(Mesh(jax.devices()[:devices], "data"), PartitionSpec("data"))

    @jax.jit
    def found(x, dy):
        scale, bias = jnp.full(4, 2, x.dtype), jnp.ones(4, x.dtype)
        (y, mean, var), pull = jax.vjp(lambda *inputs: batch_norm.normalize(*inputs, passes), x, scale, bias)
        return y, mean, var, *pull((dy, jnp.zeros_like(mean), jnp.zeros_like(var)))

    ours = found(*(jax.device_put(v.astype(np.float32), place) for v in (x, dy)))
    exact = found(*(v.astype(np.float64) for v in (x, dy)))
    for name, a, b in zip(("y", "mean", "var", "dx", "dscale", "dbias"), ours, exact):
        assert a.dtype == np.float32 and b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * np.abs(b).max(), err_msg=name)
    np.testing.assert_allclose(np.var(exact[0].reshape(-1, passes, 64, 4), (0, 2)), 4 / 1.1, rtol=0.1)
