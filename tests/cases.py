"""What tests share that run in many cases, or ask for equal bits of two programs."""

import os

import pytest

EXACT = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ.get("XLA_FLAGS", "") else {}
"""Compiler options of programs whose results are to be equal to the last bit: without the fusion emitters, as
conftest.py compiles all others, the same operations may be rounded in another way in another program."""


def slow_but(kept, cases):
    """The cases, tuples or single values; those for which `kept(case)` is false are marked slow."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if kept(case) else pytest.mark.slow)
            for case in cases]
