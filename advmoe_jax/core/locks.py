"""Locks on folders of runs, which the death of their holder releases."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

from etils import epath

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.paths import is_remote

NAME = ".lock"
_TRIES, _PAUSE = 5, 0.02  # seconds; `holder` of another process takes the lock for a moment


class Held(UserError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def hold(folder: epath.PathLike) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it does not exist.

    The lock is an flock of the file FOLDER/.lock: the system releases it when the process ends, however that happens.
    The file stays, and says in one JSON line who holds or last held it: {"host", "pid", "since"}. Programs that the
    process starts do not share the lock. An object store has no locks: nothing happens there.

    Raises:
        Held: another process holds it, or this one does already.
    """
    if is_remote(folder):
        yield
        return
    with files.room(epath.Path(folder) / NAME):
        descriptor = _take(epath.Path(folder))
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # for forked children too, which have copies of the descriptor
        os.close(descriptor)


def holder(folder: epath.PathLike) -> dict | None:
    """Who holds the lock of a folder now: {"host": text, "pid": number, "since": text}, None for nobody.

    Creates nothing. A lock that was taken a moment ago may not say yet who holds it; the values are None then.
    """
    if is_remote(folder):
        return None
    try:
        descriptor = os.open(epath.Path(folder) / NAME, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return None if _locked(descriptor, fcntl.LOCK_SH) else _read(descriptor)
    finally:
        os.close(descriptor)


def _take(folder: epath.Path) -> int:
    """A descriptor of the lock file, locked and signed; what was made for it is removed if the system refuses."""
    new_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    new_file = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if _locked(descriptor, fcntl.LOCK_EX):
            _sign(descriptor)
            return descriptor
    except OSError:
        os.close(descriptor)
        if new_file:
            path.unlink(missing_ok=True)
        if new_folder:
            os.rmdir(folder)
        raise
    now = _read(descriptor)
    os.close(descriptor)
    who = f"process {now['pid']} on {now['host']} since {now['since']}" if now["pid"] else "another process"
    raise Held(f"{folder} is in use by {who}: expected a workdir that no other process trains or evaluates, or wait "
               "for it to end")


def _sign(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    line = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode() + b"\n"
    os.pwrite(descriptor, line, 0)  # over the old line, so that there is always a whole one to read
    os.ftruncate(descriptor, len(line))


def _locked(descriptor: int, kind: int) -> bool:
    """Takes a lock of a kind and returns True, or False if others hold it for more than a moment."""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
    return False


def _read(descriptor: int) -> dict:
    """What the holder wrote; None for each value before it has."""
    try:
        return json.loads(os.pread(descriptor, 4096, 0).partition(b"\n")[0])
    except ValueError:
        return dict.fromkeys(("host", "pid", "since"))
