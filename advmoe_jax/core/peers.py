"""The processes of a run find each other before jax joins them, and notice when one of them is gone.

jax waits without a word, deaf to signals, for processes that never come; it lets processes of different configs train
together; and it aborts, a minute or more later, when one of them is killed. So every process keeps a connection to
process 0, at the coordinator's port, which is free for jax again when all have come. A message is a line of JSON.
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from advmoe_jax.core import stop
from advmoe_jax.core.errors import EXIT_OK, EXIT_PREEMPTED, UserError, outcome

_BETWEEN_LINES = 30  # seconds
_BETWEEN_LOOKS = 1  # at most so many seconds until a signal is seen
_PAUSE = 0.3  # seconds between two tries to reach process 0
_GRACE = 3  # seconds in which a process may end by itself after another has failed
_LONGEST = 10**7  # bytes of a message

Left = Callable[[str], float]
"""Given what is waited for, the seconds until there is something to do about it; prints a line from time to time, and
ends the wait when the process is asked to stop."""


@contextlib.contextmanager
def together(host: str, port: int, count: int, index: int, facts: Mapping[str, str], patience: int) -> Iterator[None]:
    """Meets the other processes, and leaves when the block ends.

    During the block this process ends at once, with one line, if another is killed (exit code 75) or fails (with the
    other's exit code).

    Args:
        host, port: where process 0 is.
        count: how many processes there are.
        index: which one this is.
        facts: {name: value} that must be the same in all of them.
        patience: seconds to wait for the others.
    Raises:
        UserError: one has not come in time, has come twice, or has other facts.
    """
    left = _clock(f"process {index} of {count}", f"{host}:{port}", patience)
    facts = {"--num_processes": str(count)} | dict(facts)
    links = _gather(port, count, facts, left) if index == 0 else _visit(host, port, index, facts, left)
    leaving = threading.Event()
    watch = threading.Thread(target=_watch, args=({link: i for i, link in links.items()}, leaving), daemon=True)
    watch.start()

    def say(code, why=""):
        leaving.set()
        for link in links.values():
            _send(link, end=code, why=why)

    try:
        yield
    except BaseException as error:
        if not isinstance(error, (UserError, KeyboardInterrupt)):
            time.sleep(2 * _GRACE)  # it may be what jax says of a process that is gone: the watch ends this one then
        code, line = outcome(error)
        say(code, f"process {index}: {line}")
        if index == 0:
            watch.join(2 * _GRACE)  # jax aborts the others if process 0 goes first
        raise
    else:
        say(EXIT_OK)


def _clock(who: str, where: str, patience: int) -> Left:
    begin = last = time.monotonic()
    print(f"{who}: meets the others at {where}, waits up to {patience} s (--join_timeout)", file=sys.stderr, flush=True)

    def left(what):
        nonlocal last
        stop.check()
        now = time.monotonic()
        if now - begin >= patience:
            raise UserError(f"{who}: {what}, after {patience} s (--join_timeout): expected all processes to start with "
                            "the same command and a --process_id each")
        if now - last >= _BETWEEN_LINES:
            print(f"{who}: {what}, after {now - begin:.0f} s", file=sys.stderr, flush=True)
            last = now
        return min(last + _BETWEEN_LINES - now, begin + patience - now, _BETWEEN_LOOKS)

    return left


def _gather(port: int, count: int, facts: dict[str, str], left: Left) -> dict[int, socket.socket]:
    """Process 0: waits for the others, {process: connection}."""
    links, theirs = {}, {}
    try:
        with _door(port) as door:
            while missing := [i for i in range(1, count) if i not in links]:
                what = f"process {', '.join(map(str, missing))} has not come"
                for link in links.values():
                    _send(link, what=what)
                ready = select.select([door, *links.values()], [], [], left(what))[0]
                for i in [i for i, link in links.items() if link in ready]:  # it has nothing to say: it has left
                    links.pop(i).close()
                if door in ready:
                    _admit(door.accept()[0], count, links, theirs, facts)
        for i in links:
            _compare(i, facts, theirs[i])
    except UserError as error:
        for link in links.values():
            _send(link, refused=str(error))
            link.close()
        raise
    for link in links.values():
        _send(link, met=True)
    return links


def _door(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(f"--coordinator: process 0 cannot open port {port}: {os.strerror(error.errno)}; expected one "
                        "that is free on its host, and one process with --process_id 0") from None


def _admit(link: socket.socket, count: int, links: dict[int, socket.socket], theirs: dict[int, dict],
           facts: dict[str, str]) -> None:
    link.settimeout(5)
    hello = _receive(link)
    if not hello or not {"process", "facts"} <= hello.keys():
        return link.close()  # a stranger
    index = hello["process"]
    if index in links or index == 0:
        _send(link, refused=f"process {index} has come before: expected another --process_id in every process")
        return link.close()
    links[index], theirs[index] = link, hello["facts"]
    if index >= count:
        _compare(index, facts, theirs[index])  # whose --num_processes is another


def _compare(index: int, ours: dict[str, str], theirs: dict[str, str]) -> None:
    different = [f"{name} {ours.get(name, 'missing')} and {theirs.get(name, 'missing')}"
                 for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if different:
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(f"processes 0 and {index} differ: {', '.join(different[:5])}{more}; expected the same command "
                        "and the same code in every process")


def _visit(host: str, port: int, index: int, facts: dict[str, str], left: Left) -> dict[int, socket.socket]:
    """Another process: comes to process 0 and waits until all have, {0: connection}."""
    why = "it has not started"
    while True:
        pause = min(_PAUSE, left(f"no process 0 at {host}:{port} ({why})"))
        try:
            link = socket.create_connection((host.strip("[]"), port), timeout=5)
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(pause)
            continue
        if link.getsockname() == link.getpeername():  # a port nobody listens at may be given to the caller himself
            link.close()
            continue
        _send(link, process=index, facts=facts)
        what = "process 0 has not answered"
        while True:
            if not select.select([link], [], [], left(what))[0]:
                continue
            answer = _receive(link)
            if answer is None:
                break
            if "refused" in answer:
                raise UserError(answer["refused"])
            if "met" in answer:
                return {0: link}
            what = answer["what"]
        link.close()
        why = "it has left"
        time.sleep(pause)


def _watch(links: dict[socket.socket, int], leaving: threading.Event) -> None:
    """Ends this process when another is gone or has failed, unless it is about to end by itself."""
    for link in links:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host without power says no goodbye
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 5)):
            if hasattr(socket, name):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    while links:
        for link in select.select(list(links), [], [])[0]:
            index, last = links.pop(link), _receive(link)
            if leaving.is_set() or last and (last["end"] == EXIT_OK or leaving.wait(_GRACE)):
                continue
            code, why = (last["end"], last["why"]) if last else (
                EXIT_PREEMPTED, f"process {index} is gone; the same command in every process continues")
            for other in links:
                _send(other, end=code, why=why)
            sys.stdout.flush()
            print(f"error: {why}", file=sys.stderr, flush=True)
            os._exit(code)


def _send(link: socket.socket, **message) -> None:
    with contextlib.suppress(OSError):  # who has left is seen by who reads
        link.sendall(json.dumps(message).encode() + b"\n")


def _receive(link: socket.socket) -> dict | None:
    """The next message; None from who has left, or is no process of ours."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = link.recv(1)
            if not byte or len(line) > _LONGEST:
                return None
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
