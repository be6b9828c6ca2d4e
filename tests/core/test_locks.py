"""One process at a time in a folder, and what its death leaves behind."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from advmoe_jax.core import locks
from advmoe_jax.core.errors import EXIT_BAD_INPUT

HOLD = ("from advmoe_jax.core import locks; import sys; "
        "lock = locks.hold(sys.argv[1]); lock.__enter__(); print('held'); input()")


@contextlib.contextmanager
def _other(folder):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path):
    folder = tmp_path / "runs" / "x"
    with _other(folder) as process:
        with pytest.raises(locks.Held) as refused, locks.hold(folder):
            pass
        assert re.fullmatch(
            rf"{folder} is in use by process {process.pid} on {socket.gethostname()} since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d: expected a workdir that no other process trains or evaluates, "
            r"or wait for it to end", str(refused.value))
        assert refused.value.exit_code == EXIT_BAD_INPUT
        assert locks.holder(folder)["pid"] == process.pid
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert locks.holder(folder) is None
        assert json.loads((folder / ".lock").read_text())["pid"] == process.pid  # the last holder
        with locks.hold(folder):
            assert locks.holder(folder)["pid"] == os.getpid()


def test_the_end_and_an_error_release(tmp_path):
    with locks.hold(tmp_path):
        with pytest.raises(locks.Held), locks.hold(str(tmp_path)):  # not twice in one process either
            pass
        assert locks.holder(tmp_path) == json.loads((tmp_path / ".lock").read_text())
    assert locks.holder(tmp_path) is None
    with pytest.raises(ZeroDivisionError), locks.hold(tmp_path):
        1 / 0
    with locks.hold(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_longer_line_of_the_last_holder_is_gone(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"host": "h" * 500, "pid": 1, "since": ""}) + "\n")
    with locks.hold(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_program_started_meanwhile_does_not_inherit(tmp_path):
    lock = locks.hold(tmp_path)
    lock.__enter__()
    child = subprocess.Popen([sys.executable, "-c", "print('up'); input()"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, close_fds=False)
    try:
        assert child.stdout.readline() == "up\n"
        seen = [os.readlink(f"/proc/{child.pid}/fd/{name}") for name in os.listdir(f"/proc/{child.pid}/fd")] \
            if sys.platform == "linux" else []
        assert str(tmp_path / ".lock") not in seen
        lock.__exit__(None, None, None)
        with locks.hold(tmp_path):
            pass
    finally:
        child.communicate("\n")


def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    """The parent starts a program that outlives it."""
    start = ("import subprocess; child = subprocess.Popen([sys.executable, '-c', 'input()'], close_fds=False, "
             "stdout=subprocess.DEVNULL); print(child.pid); input()")
    parent = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("input()", start), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout.readline() == "held\n"
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it is alive
        assert locks.holder(tmp_path) is None
    finally:
        parent.kill()
        parent.communicate()  # closes the standard input of both


def test_looking_creates_nothing_and_disturbs_nobody(tmp_path):
    assert locks.holder(tmp_path / "none") is None and locks.holder(tmp_path) is None
    (tmp_path / "file").write_text("")
    assert locks.holder(tmp_path / "file") is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with locks.hold(tmp_path):
        pass
    descriptor = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # as `holder` of another process
    assert locks.holder(tmp_path) is None
    os.close(descriptor)


def test_a_lock_that_says_nothing_yet(tmp_path):
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert locks.holder(tmp_path) == {"host": None, "pid": None, "since": None}
    with pytest.raises(locks.Held, match="is in use by another process: expected"), locks.hold(tmp_path):
        pass
    os.close(descriptor)


@pytest.mark.parametrize("existed", [False, True])
def test_what_cannot_be_locked_is_left_as_it_was(existed, tmp_path, monkeypatch):
    def refuse(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    folder = tmp_path / "x"
    if existed:
        folder.mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks available"), locks.hold(folder):
        pass
    assert folder.exists() == existed and not (folder / ".lock").exists()


def test_an_object_store_has_no_locks():
    with locks.hold("gs://bucket/runs/x"), locks.hold("gs://bucket/runs/x"):
        assert locks.holder("gs://bucket/runs/x") is None
