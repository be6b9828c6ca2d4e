"""Being asked to stop: signals are noted, and the work looks where it can end well.

A handler that raises would do so in whatever code is running, some of which swallows it: callbacks of jax, imports of
matplotlib. In a cluster SIGTERM goes to jax's own handler, which tells the other processes.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from advmoe_jax.core.errors import EXIT_INTERRUPTED, Preempted

_asked: set[int] = set()  # signals are of the process, and so is what is known of them
_left_to_others: set[int] = set()
_reached: Callable[[int], bool] | None = None
_last = 0  # number that `_reached` was asked with


def is_asked(step: int | None = None) -> bool:
    """Whether SIGTERM came, for work that saves before it stops. Raises KeyboardInterrupt if Ctrl-C did.

    In a cluster all processes learn of it at the same call, whoever was asked: each of them makes the same calls, with
    the same `step` of training, or without.
    """
    global _last
    if signal.SIGINT in _asked:
        raise KeyboardInterrupt
    if _reached:
        _last = _last + 1 if step is None else step
        if _reached(_last):
            _asked.add(signal.SIGTERM)
    return signal.SIGTERM in _asked


def check() -> None:
    """Raises Preempted if SIGTERM came and KeyboardInterrupt if Ctrl-C did, for work that has nothing to save. In a
    cluster as `is_asked`."""
    if signal.SIGINT in _asked:
        raise KeyboardInterrupt
    if signal.SIGTERM not in _left_to_others and is_asked():
        raise Preempted("stopped by SIGTERM; the same command continues")


@contextlib.contextmanager
def shared(reached: Callable[[int], bool]) -> Iterator[None]:
    """In a cluster, has `reached` say whether one of the processes was asked to stop: given a number that rises from
    call to call, it is true for the same one in all of them."""
    global _reached
    _reached = reached
    try:
        yield
    finally:
        _reached = None


@contextlib.contextmanager
def saved_first() -> Iterator[None]:
    """Has `check` leave SIGTERM to the caller, who asks `is_asked` and saves before it stops."""
    _left_to_others.add(signal.SIGTERM)
    try:
        yield
    finally:
        _left_to_others.clear()


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Notes SIGTERM and Ctrl-C, of which the second ends the process at once; at the end raises as `check`.

    To be entered before a cluster is joined. In a thread nothing is noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_listen, args=(reader,), daemon=True).start()
    woken = signal.set_wakeup_fd(writer)
    before = {number: signal.signal(number, lambda number, _: _asked.add(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
        check()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)
        _asked.clear()


def _listen(reader: int) -> None:
    """Counts Ctrl-C at once, also while the main thread waits for XLA and handles no signals."""
    with open(reader, "rb", buffering=0) as signals:
        count = 0
        while number := signals.read(1):
            count += number[0] == signal.SIGINT
            if number[0] == signal.SIGINT and count == 1:
                print("stopping; Ctrl-C again ends at once", file=sys.stderr, flush=True)
            if count > 1:
                os._exit(EXIT_INTERRUPTED)
