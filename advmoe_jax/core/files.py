"""Files that are there whole or not at all, and hashes of what they hold.

A path is text, a pathlib.Path or an epath.Path, local or in an object store ("gs://bucket/runs/a").
"""

import hashlib
import io
import json
import os
import tempfile
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core import paths


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes through a temporary file in the same folder, which is made; in an object store at once."""
    path = epath.Path(path)
    if paths.is_remote(path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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


def write_figure(path: epath.PathLike, figure: Any) -> None:
    """As `write_bytes`, a matplotlib figure as a PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_bytes(path, content.getvalue())


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a last line that was cut off is left out."""
    path, records = epath.Path(path), []
    if not path.exists():
        return []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def fingerprint(arrays: dict[str, Any]) -> str:
    """sha256 in hex over the bytes of arrays, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))
    return found.hexdigest()
