"""The package's convolution against plain lax convolutions: gradients, alone and inside a device loop."""

from typing import Any

import jax
from jax import lax

from advmoe_jax.bench.timing import interleaved
from advmoe_jax.ops.conv import conv2d

_CASES = ((64, 32, 3, 64), (64, 32, 64, 64), (64, 16, 128, 128), (64, 8, 256, 256), (64, 32, 16, 16))


def _plain(x, kernel):
    p = kernel.shape[0] // 2
    return lax.conv_general_dilated(x, kernel, (1, 1), ((p, p), (p, p)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _gradients(conv, loop: bool):
    def one(x, kernel, dy):
        return jax.vjp(conv, x, kernel)[1](dy)

    def looped(x, kernel, dy):
        def body(_, carry):
            dx, dk = one(x + 0 * carry[0], kernel, dy)
            return dx, carry[1] + dk
        return lax.fori_loop(0, 2, body, (x, kernel))

    return jax.jit(looped if loop else one)


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each shape: milliseconds of both gradients (image and kernel), plain lax over ours."""
    rows = []
    for batch, size, inputs, outputs in _CASES:
        keys = jax.random.split(jax.random.key(0), 3)
        args = (jax.random.normal(keys[0], (batch, size, size, inputs)),
                jax.random.normal(keys[1], (3, 3, inputs, outputs)),
                jax.random.normal(keys[2], (batch, size, size, outputs)))
        row = {"B x H x I x O": f"{batch} x {size} x {inputs} x {outputs}"}
        for where, loop in (("gradients", False), ("in a loop of 2", True)):
            ms = interleaved({"lax": _gradients(_plain, loop), "ours": _gradients(conv2d, loop)}, args, rounds)
            row |= {f"{where}: lax ms": ms["lax"], f"{where}: ours ms": ms["ours"],
                    f"{where}: lax / ours": ms["lax"] / ms["ours"]}
        rows.append(row)
    return rows
