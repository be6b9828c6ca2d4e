"""Processes that meet, those that do not, and what the others see when one is gone. Here a process is a thread."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import time

import pytest

from advmoe_jax.core import peers
from advmoe_jax.core.errors import NonFiniteError, UserError

FACTS = {"config.seed": "0"}


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ended(monkeypatch):
    """Codes with which processes ended at once; quick ones."""
    codes = []
    monkeypatch.setattr(peers.os, "_exit", codes.append)
    monkeypatch.setattr(peers, "_GRACE", 0.2)
    return codes


def start(port, index, count=2, facts=FACTS, patience=5.0, during=lambda: None):
    with peers.together("localhost", port, count, index, facts, patience):
        during()


def outcomes(*calls):
    """What each of several processes ends with: its UserError in words, or None."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        started = [pool.submit(start, **call) for call in calls]
        errors = [call.exception(20) for call in started]
    assert all(isinstance(error, UserError | None) for error in errors), errors
    return [str(error) if error else None for error in errors]


def test_all_come_and_the_port_is_free_again(port, ended):
    def takes_the_port():
        with peers._door(port):
            pass

    assert outcomes(dict(port=port, index=2, count=3), dict(port=port, index=1, count=3),
                    dict(port=port, index=0, count=3, during=takes_the_port)) == [None] * 3
    assert not ended


@pytest.mark.parametrize("calls, words", [
    ([dict(index=1, patience=.4)], ["process 1 of 2: no process 0 at localhost:", "refused", "after 0.4 s"]),
    ([dict(index=0, count=4, patience=.4), dict(index=2, count=4)], ["process 1, 3 has not come", "after 0.4 s"]),
    ([dict(index=0), dict(index=1, facts={"config.seed": "1"})], ["processes 0 and 1 differ: config.seed 0 and 1;"]),
    ([dict(index=0), dict(index=1, facts={})], ["config.seed 0 and missing;"]),
    ([dict(index=0), dict(index=2, count=3)], ["processes 0 and 2 differ: --num_processes 2 and 3;"])])
def test_refused_in_the_same_words_everywhere(calls, words, port):
    told = set(outcomes(*(call | {"port": port} for call in calls)))
    assert len(told) == 1 and all(word in told.copy().pop() for word in words), told


def test_a_number_that_comes_twice_is_refused_and_the_others_wait_on(port):
    told = outcomes(*(dict(port=port, index=index, count=3, patience=1.) for index in (0, 1, 1)))
    assert [any(words in text for text in told) for words in ("process 1 has come before", "process 2 has not come")]
    assert outcomes(dict(port=port, index=0, patience=.1))[0].endswith("a --process_id each")  # the port is given back
    with peers._door(port):
        assert f"cannot open port {port}" in outcomes(dict(port=port, index=0))[0]


def test_lines_while_it_waits(port, capsys, monkeypatch):
    monkeypatch.setattr(peers, "_BETWEEN_LINES", 0.2)
    outcomes(dict(port=port, index=0, count=3, patience=.9), dict(port=port, index=1, count=3))
    lines = capsys.readouterr().err.splitlines()
    for index in (0, 1):
        own = [line for line in lines if line.startswith(f"process {index} of 3: ")]
        assert f"meets the others at localhost:{port}, waits up to" in own[0]
        assert len(own) >= 3 and all("process 2 has not come, after " in line for line in own[2:]), own


def test_signals_work_while_it_waits(port):
    def interrupt(*_):
        raise KeyboardInterrupt

    before, begin = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    try:
        for index in (0, 1):
            signal.setitimer(signal.ITIMER_REAL, .2)
            with pytest.raises(KeyboardInterrupt):
                start(port, index)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begin < 2


def _connected(port):
    """A connection, as soon as there is somebody."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return socket.create_connection(("localhost", port), 5)
        time.sleep(.05)


def test_strangers_and_who_has_left_do_not_count(port):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(start, port, 0, 3)
        for hello in (b"PRI * HTTP/2.0\r\n\r\n", b"[1]\n", json.dumps(dict(process=1, facts={})).encode() + b"\n"):
            with _connected(port) as link:
                link.sendall(hello)
        others = [pool.submit(start, port, index, 3) for index in (1, 2)]
        assert [process.exception(5) for process in (first, *others)] == [None] * 3


def _fails():
    raise NonFiniteError("not finite here either")


@pytest.mark.parametrize("last, during, code, words", [
    (None, lambda: time.sleep(.5), 75, "process 1 is gone; the same command"),
    (dict(end=4, why="process 1: step 3"), lambda: time.sleep(.5), 4, "process 1: step 3"),
    (dict(end=4, why="process 1: step 3"), _fails, None, ""), (dict(end=0, why=""), lambda: time.sleep(.5), None, "")])
def test_the_others_end_with_who_is_gone_or_fails(last, during, code, words, port, ended, capsys):
    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        first = pool.submit(start, port, 0, 3, during=during)
        links = [stack.enter_context(_connected(port)) for _ in (1, 2)]
        for index, link in enumerate(links, 1):
            peers._send(link, process=index, facts={"--num_processes": "3"} | FACTS)
        for link in links:
            while "met" not in peers._receive(link):
                pass
        if last:
            peers._send(links[0], **last)
        links[0].close()
        told = peers._receive(links[1])
        links[1].close()
        assert isinstance(first.exception(5), NonFiniteError if during is _fails else type(None))
    assert ended[:1] == ([code] if code else []) and words in told["why"]
    assert (f"error: {told['why']}\n" in capsys.readouterr().err) == bool(code)
