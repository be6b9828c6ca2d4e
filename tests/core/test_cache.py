"""Damaged entries of the compilation cache are removed, which jax does not do itself."""

import warnings

import jax
import jax.numpy as jnp
import pytest

from advmoe_jax.core import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A compilation cache of its own, with one whole entry. Warnings that pass are printed."""
    from jax.experimental.compilation_cache import compilation_cache
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(message))
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    cache._mend.cache_clear()
    cache.use()
    _run()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()
    cache._mend.cache_clear()


def _run():
    jax.clear_caches()

    def damaged_test_program(x):
        return x * 3 + 1

    jax.jit(damaged_test_program)(jnp.zeros(2))


@pytest.mark.parametrize("size", [0, 100])
def test_a_damaged_entry_is_written_anew(size, folder, capsys):
    """With one line, and none at the next start."""
    [entry] = folder.glob("*damaged_test_program-*-cache")
    for path in folder.glob("*-cache"):
        path.write_bytes(path.read_bytes()[:size])
    _run()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"the compilation cache in {folder} is damaged" in told
    assert cache._is_whole(entry)
    _run()
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_told_once_and_other_warnings_stay(folder, capsys):
    for program in ("jit_a", "jit_b"):
        (folder / f"{program}-0f-cache").write_bytes(b"half")
        warnings.warn(f"Error writing persistent compilation cache entry for '{program}': OSError: No space left",
                      stacklevel=1)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot be written" in told and "No space left" in told
    assert not list(folder.glob("jit_?-0f-cache"))
    warnings.warn("of another kind", stacklevel=1)
    assert capsys.readouterr().out == "of another kind\n"
