"""Being asked to stop."""

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


@dataclasses.dataclass(frozen=True)
class Notice:
    """Whether to stop. In a cluster all processes learn of it at the same step, whoever was asked."""

    asked: threading.Event

    def reached(self, step: int) -> bool:
        """Whether to save and stop before iteration `step`; every process asks at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked.is_set()


@contextmanager
def watch() -> Iterator[Notice]:
    """Turns SIGTERM into a notice while the context lasts.

    In a cluster jax's own handler is in place, which tells the other processes, and stays.
    """
    asked = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield Notice(asked)
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield Notice(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
