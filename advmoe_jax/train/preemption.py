"""Being asked to stop. In a cluster jax's own SIGTERM handler, which tells the other processes, stays in place."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from advmoe_jax.core.errors import Preempted


@dataclasses.dataclass(frozen=True)
class Notice:
    """Whether to stop. In a cluster all processes learn of it at the same step, whoever was asked."""

    asked: threading.Event

    def reached(self, step: int) -> bool:
        """Whether to save and stop before iteration `step`; every process asks at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.asked.is_set()


@contextlib.contextmanager
def watch() -> Iterator[Notice]:
    """Turns SIGTERM into a notice, for work that saves before it stops."""
    notice = Notice(threading.Event())
    with contextlib.ExitStack() as stack:
        if jax.process_count() == 1:
            stack.enter_context(_handle(signal.SIGTERM, lambda *_: notice.asked.set()))
        yield notice


@contextlib.contextmanager
def stops() -> Iterator[None]:
    """Lets SIGTERM raise Preempted and Ctrl-C raise KeyboardInterrupt at once, for work that has nothing to save.

    To be entered before a cluster is joined.
    """
    def stop(*_):
        raise Preempted("stopped by SIGTERM; the same command continues")

    def interrupt(*_):
        # asyncio, in which checkpoints are written, replaces Python's own handler and may swallow the signal.
        raise KeyboardInterrupt

    with _handle(signal.SIGTERM, stop), _handle(signal.SIGINT, interrupt):
        yield


@contextlib.contextmanager
def _handle(number: signal.Signals, handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
