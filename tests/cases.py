"""Parameters of tests that run in many cases: some of them by default, all of them with -m ""."""

import pytest


def slow_but(kept, cases):
    """The cases, tuples or single values; those for which `kept(case)` is false are marked slow."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if kept(case) else pytest.mark.slow)
            for case in cases]
