"""Files that are there whole or not at all, and hashes of what they hold.

A path is text, a pathlib.Path or an epath.Path, local or in an object store ("gs://bucket/runs/a").
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core import paths
from advmoe_jax.core.errors import FULL, NoSpace, UserError

_PART = ".part"


@contextlib.contextmanager
def room(path: epath.PathLike, size: int = 0) -> Iterator[None]:
    """For a write: raises NoSpace, which names the disk, if there is no room. Other errors of the system name the path.

    Args:
        path: what is written.
        size: how many bytes, about.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # orbax raises whatever its storage raised
        if not is_full(error):
            if isinstance(error, OSError) and error.filename is None:
                error.filename = os.fspath(path)
            raise
        folder = next(folder for folder in epath.Path(path).absolute().parents if folder.exists())
        entries = os.statvfs(folder)
        few = " and no more files" if entries.f_files and not entries.f_favail else ""
        wanted = f"{size:,} bytes were to be written, and " if size else ""
        raise NoSpace(f"no space left for {path}: {wanted}the disk of {folder} takes "
                      f"{shutil.disk_usage(folder).free:,} bytes{few}; the same command continues when there is room"
                      ) from None


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in FULL or any(os.strerror(code) in str(error) for code in FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes through a temporary file in the same folder, which is made; in an object store at once."""
    path = epath.Path(path)
    if paths.is_remote(path):
        path.write_bytes(content)
        return
    with room(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        try:
            with os.fdopen(handle, "wb") as file:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # see `remove_leftovers`
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes what writes that were killed left in a folder and below; those that are under way hold locks."""
    for path in [] if paths.is_remote(folder) else pathlib.Path(folder).rglob(f".*{_PART}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)


def write_text(path: epath.PathLike, content: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: epath.PathLike, content: Any) -> None:
    """As `write_text`, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_npz(path: epath.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """As `write_bytes`, compressed; arrays that are None are left out."""
    content = io.BytesIO()
    np.savez_compressed(content, **{name: array for name, array in arrays.items() if array is not None})
    write_bytes(path, content.getvalue())


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """What `write_npz` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): expected arrays; delete it") from None


def write_figure(path: epath.PathLike, figure: Any) -> None:
    """As `write_bytes`, a matplotlib figure as a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_bytes(path, content.getvalue())


def check_rights(folder: epath.PathLike, what: str) -> None:
    """Raises UserError unless files in a bucket's folder, `what` it is, can be written, read and deleted."""
    probe = epath.Path(folder) / f".rights-{uuid.uuid4().hex}"
    with paths.reached(folder, what):
        probe.write_text("probe")
        probe.read_text()
        probe.unlink()


def remove_folder(path: epath.PathLike) -> None:
    """Removes a folder with all that it holds, if it is there."""
    path = epath.Path(path)
    if path.exists():
        path.rmtree(missing_ok=True)


def append_json_line(path: epath.PathLike, record: dict[str, Any]) -> None:
    """Adds a line to a JSON Lines file; a last line that was cut off is replaced.

    In an object store the file is read and written anew.
    """
    path, line = epath.Path(path), json.dumps(record).encode() + b"\n"
    if paths.is_remote(path):
        content = path.read_bytes() if path.exists() else b""
        path.write_bytes(content[:content.rfind(b"\n") + 1] + line)
        return
    with room(path, len(line)), _opened(path) as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _opened(path: epath.Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab+")


def read_json_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a last line that was cut off is left out."""
    return check_json_lines(path)[0]


def check_json_lines(path: epath.PathLike, keys: Set[str] = frozenset()) -> tuple[list[dict[str, Any]], bool]:
    """The lines of a JSON Lines file before the first that is damaged, and whether none is.

    A line is an object with all `keys`. A last line that was cut off is left out, and is no damage.
    """
    path, records = epath.Path(path), []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            if not keys <= record.keys():
                raise ValueError
        except (ValueError, TypeError, AttributeError):
            return records, line is lines[-1] and not line.endswith(b"\n")
        records.append(record)
    return records, True


def fingerprint(arrays: dict[str, Any]) -> str:
    """sha256 in hex over the bytes of arrays, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
    return found.hexdigest()
