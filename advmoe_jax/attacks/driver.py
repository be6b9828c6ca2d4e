"""Runs iterative attacks: unrolled or looped inside a traced program, stepped from the host outside one.

XLA on CPU runs a loop over convolutions slower than the same compiled step called again and again, and a
compiled step serves every number of steps; an accelerator would idle between such calls.
"""

import functools
from typing import Any, Protocol

import jax

from advmoe_jax.core.errors import one_of

DRIVERS = ("auto", "unroll", "device", "host")
_MAX_UNROLLED = 4


class Program(Protocol):
    """An iterative attack. Hashable and equal by configuration, so that compiled programs are shared.

    `args` is a pytree of everything that does not change: logits_fn, keys, images, labels, eps.
    """

    def start(self, args: Any) -> Any:
        """The first carry."""

    def step(self, args: Any, carry: Any, i: jax.Array) -> Any:
        """The next carry."""

    def finish(self, args: Any, carry: Any) -> Any:
        """The result."""


@functools.partial(jax.jit, static_argnames=("program",))
def _start(program, args):
    return program.start(args)


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("carry",))
def _step(program, args, carry, i):
    return program.step(args, carry, i)


@functools.partial(jax.jit, static_argnames=("program",))
def _finish(program, args, carry):
    return program.finish(args, carry)


@functools.partial(jax.jit, static_argnames=("program", "num_steps"))
def _on_device(program, args, num_steps):
    return _loop(program, args, num_steps)


def _loop(program, args, num_steps):
    carry = jax.lax.fori_loop(0, num_steps, lambda i, c: program.step(args, c, i), program.start(args))
    return program.finish(args, carry)


def run(program: Program, args: Any, num_steps: int, driver: str = "auto") -> Any:
    """Starts, steps `num_steps` times and finishes an attack.

    Args:
        program: what to run.
        args: its constant inputs, arrays or tracers.
        num_steps: static number of steps.
        driver: "unroll" and "device" trace the whole attack, "host" compiles one step; "auto" unrolls up to 4
            steps and loops above inside a traced program; outside one it steps from the host on CPU and loops on
            the device elsewhere.
    """
    if one_of("driver", driver, DRIVERS) == "auto":
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            driver = "unroll" if num_steps <= _MAX_UNROLLED else "device"
        else:
            driver = "host" if jax.default_backend() == "cpu" else "device"
    if driver == "device":
        return _on_device(program, args, num_steps)
    start, step, finish = (_start, _step, _finish) if driver == "host" else (
        type(program).start, type(program).step, type(program).finish)
    carry = start(program, args)
    for i in range(num_steps):
        carry = step(program, args, carry, i)
    return finish(program, args, carry)
