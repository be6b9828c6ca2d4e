"""What the program asks of XLA and of the allocator, before anything runs."""

import ctypes
import os

import pytest

from advmoe_jax.core import xla


@pytest.mark.parametrize("environment, calls", [({}, 3), ({"MALLOC_ARENA_MAX": "2"}, 0), ({"GLIBC_TUNABLES": "x"}, 0)])
def test_memory_is_kept_unless_the_user_has_configured_malloc(environment, calls, monkeypatch):
    made = []
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    class Library:
        def __init__(self, _):
            self.mallopt = lambda *arguments: made.append(arguments)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    xla.keep_memory()
    assert len(made) == calls and all(isinstance(value, int) for call in made for value in call)
