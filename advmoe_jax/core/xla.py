"""Settings of XLA, and of the memory under it."""

import ctypes
import importlib.metadata
import os
import sys

# The fusions that this flag names run convolutions on one core; empty turns them off. Only jaxlib versions that
# were seen to know the flag get it: XLA aborts the process on a name that it does not know.
_YNN_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_YNN_VERSIONS = ("0.10.0", "0.10.1", "0.10.2")
_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD = -4, -1, -2  # of glibc's mallopt


def set_cpu_flags() -> None:
    """Adds the CPU convolution flag to `XLA_FLAGS` unless the user has set it or jaxlib may not know it."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _YNN_FLAG not in flags and importlib.metadata.version("jaxlib") in _YNN_VERSIONS:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNN_FLAG}=".strip()


def keep_memory() -> None:
    """On CPU, has glibc keep what is freed for what is allocated next, unless the user has configured malloc.

    A program on CPU gets its temporaries from malloc, which maps large ones anew in every call: the kernel then
    clears all their pages again, which was measured to take a third of the time of an attack's step. The process stays
    as large as it once was, which is for the command lines to decide, and not for an import.
    """
    import jax

    configured = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not configured and jax.default_backend() == "cpu":
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_TOP_PAD, 2**28)


def run_once_options() -> dict[str, int] | None:
    """Compiler options for a program that runs once: on CPU, where compiling it is all it costs, hardly optimised."""
    import jax

    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
