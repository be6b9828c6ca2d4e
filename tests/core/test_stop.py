"""Signals are noted and looked at: nothing that is running can swallow them."""

import contextlib
import signal
import subprocess
import sys
import threading

import pytest

from advmoe_jax.core import stop
from advmoe_jax.core.errors import Preempted

BOTH = {signal.SIGTERM: Preempted, signal.SIGINT: KeyboardInterrupt}


@pytest.mark.parametrize("number, raised", BOTH.items())
def test_a_signal_is_raised_where_the_work_looks(number, raised):
    before, reached = signal.getsignal(number), []
    with pytest.raises(raised), stop.noted():
        stop.check()
        with contextlib.suppress(BaseException):  # as a callback that ignores what is raised
            signal.raise_signal(number)
        reached.append("behind the callback")
        stop.check()
        reached.append("behind the check")
    assert reached == ["behind the callback"] and signal.getsignal(number) is before
    stop.check()


@pytest.mark.parametrize("number, raised", BOTH.items())
def test_a_signal_at_which_nobody_looked_is_raised_at_the_end(number, raised):
    """Such as one that came while a report was drawn."""
    with pytest.raises(raised), stop.noted():
        signal.raise_signal(number)


def test_work_that_saves_first_asks():
    with pytest.raises(Preempted), stop.noted():
        with stop.saved_first():
            assert not stop.is_asked()
            signal.raise_signal(signal.SIGTERM)
            stop.check()
            assert stop.is_asked()
        stop.check()
    with pytest.raises(KeyboardInterrupt), stop.noted(), stop.saved_first():
        signal.raise_signal(signal.SIGINT)
        stop.check()


def test_in_a_cluster_all_stop_at_the_same_call():
    """Of two processes one is asked: both calls number 7 are answered, and every later one."""
    numbers = []
    with pytest.raises(Preempted), stop.noted(), stop.shared(lambda number: numbers.append(number) or number == 7):
        with stop.saved_first():
            assert not stop.is_asked(4)
            stop.check()  # of a selection, which training does not count
            assert not stop.is_asked(5)
        stop.check()
        assert numbers == [4, 5, 6]
        stop.check()
    assert numbers == [4, 5, 6, 7] and not stop._asked


def test_in_a_thread_nothing_is_noted():
    def work():
        with stop.noted():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_the_second_ctrl_c_ends_at_once():
    """Also while the main thread handles no signals, as in XLA: here it is C code that computes, without the lock of
    the interpreter."""
    script = ("import hashlib; from advmoe_jax.core import stop\n"
              "with stop.noted():\n"
              "    print('up', flush=True)\n"
              "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        try:
            assert running.stdout.readline() == b"up\n"
            running.send_signal(signal.SIGINT)
            assert running.stderr.readline() == b"stopping; Ctrl-C again ends at once\n"
            running.send_signal(signal.SIGINT)
            assert running.wait(60) == 130
        finally:
            running.kill()
