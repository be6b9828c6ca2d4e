"""One launch for all blocks, in interpret mode, computes what block after block does; and it compiles for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.ops import blocks, grouped, plans

HEIGHT, INPUTS, WIDTH = 5, 3, 4


def _case(batch, num_experts, size, k, stride, ids=None):
    numbers = np.random.default_rng(batch)
    ids = numbers.integers(0, num_experts, batch) if ids is None else ids
    out = -(-HEIGHT // stride)
    return (jnp.asarray(numbers.standard_normal((num_experts, k, k, INPUTS, WIDTH))),
            jnp.asarray(numbers.standard_normal((batch, HEIGHT, HEIGHT, INPUTS))),
            jnp.asarray(numbers.standard_normal((batch, out, out, WIDTH))),
            plans.make(jnp.asarray(ids, jnp.int32), num_experts, size))


@pytest.mark.parametrize("batch, num_experts, size, k, stride, ids", [
    (7, 2, 4, 3, 1, None), (9, 3, 2, 3, 2, None), (6, 3, 4, 3, 1, [2] * 6), (5, 2, 2, 1, 2, [0, 1, 0, 0, 1])])
def test_agrees_with_blocks(batch, num_experts, size, k, stride, ids):
    with jax.enable_x64(True):
        kernels, x, dy, plan = _case(batch, num_experts, size, k, stride, ids)
        stored, starts = jnp.concatenate(list(kernels), -1), tuple(range(0, num_experts * WIDTH, WIDTH))
        ours, theirs = (
            (module.conv(kernels, x, plan, stride), module.input_grad(kernels, x, dy, plan, stride),
             module.kernel_grad(kernels, x, dy, plan, stride),
             module.gate_grad(starts, kernels, stored, x, dy, plan, stride)) for module in (grouped, blocks))
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_compiles_for_a_tpu(stride, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    shape = dict(kernels=(2, 3, 3, 64, 128), x=(16, 8, 8, 64), dy=(16, 8 // stride, 8 // stride, 128))
    kernels, x, dy = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shape.values())
    plan = jax.eval_shape(lambda: plans.make(jnp.zeros(16, jnp.int32), 2, 8))
    for function, arguments in ((grouped.conv, (kernels, x, plan)), (grouped.input_grad, (kernels, x, dy, plan)),
                                (grouped.kernel_grad, (kernels, x, dy, plan))):
        lowered = jax.jit(lambda *a, f=function: f(*a, stride)).trace(*arguments).lower(lowering_platforms=("tpu",))
        assert "tpu_custom_call" in lowered.as_text()
