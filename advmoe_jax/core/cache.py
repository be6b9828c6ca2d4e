"""The cache of compiled programs on disk."""

import contextlib
import functools
import os
import re
import warnings
import zlib

import jax
from etils import epath

from advmoe_jax.core import console

_WARNING = re.compile(r"Error (read|writ)ing persistent compilation cache entry for '(.*?)': ([^\n]*)")


def use() -> None:
    """Keeps compiled programs on disk, so that a second start of a run compiles nothing.

    The folder is `JAX_COMPILATION_CACHE_DIR`, or ~/.cache/advmoe_jax. Damaged entries are removed, with one warning.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/advmoe_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _mend()


@functools.cache
def _mend() -> None:
    """Has the damaged entries of a program removed when jax warns of it.

    It does not write them whole at once, nor anew where there is one: every start would warn and compile again.
    """
    show, told = warnings.showwarning, set()

    def mend(message, *args, **kwargs):
        found = _WARNING.match(str(message))
        if not found:
            return show(message, *args, **kwargs)
        kind, program, why = found.groups()
        folder = epath.Path(jax.config.jax_compilation_cache_dir)
        with contextlib.suppress(OSError):
            for entry in folder.glob(f"{program}-*-cache"):
                if not _is_whole(entry):
                    entry.unlink()
        if kind not in told:
            told.add(kind)
            console.warn(f"the compilation cache in {folder} " + (
                "is damaged: what cannot be read is removed and compiled again" if kind == "read" else
                f"cannot be written, and the next start compiles again: {why}"))

    warnings.showwarning = mend


def _is_whole(entry: epath.Path) -> bool:
    try:
        return bool(zlib.decompress(entry.read_bytes()))
    except zlib.error:
        return False
