"""Times several functions against each other."""

import statistics
import time
from collections.abc import Callable

import jax


def interleaved(functions: dict[str, Callable], args: tuple, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, their calls taking turns, compilation left out.

    Args:
        functions: {name: jitted function}, all called with `args`.
        args: arrays; weights are among them, never closed over.
        rounds: calls of each.
    """
    for function in functions.values():
        jax.block_until_ready(function(*args))
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}
