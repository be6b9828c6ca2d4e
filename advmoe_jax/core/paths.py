"""Folders and files by name, on this machine or in Google Cloud Storage."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

from etils import epath

from advmoe_jax.core.errors import UserError, first_line

os.environ.setdefault("EPATH_USE_TF", "false")  # or etils loads TensorFlow for gs:// wherever it is installed
_REMOTE = "gs://"


def path(text: str | os.PathLike) -> epath.Path:
    """A path with pathlib's methods, whether it is local or remote.

    Args:
        text: a local path, or "gs://BUCKET/FOLDER".
    Raises:
        UserError: another scheme, or what reads gs:// is not installed.
    """
    text = os.fspath(text)
    if "://" in text and not text.startswith(_REMOTE):
        raise UserError(f"cannot read or write {text}: expected a local path or {_REMOTE}BUCKET/FOLDER")
    if text.startswith(_REMOTE) and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text} needs gcsfs: run `pip install 'advmoe_jax[gcs]'`")
    return epath.Path(text)


def listed(text: str) -> list[str]:
    """Names with commas between them, each perhaps with "@best" or "@last". What exists is one name, commas and all."""
    parts, found = text.split(","), []
    while parts:
        heads = [",".join(parts[:count]).strip() for count in range(len(parts), 0, -1)]
        name = next((head for head in heads if _is_there(source(head)[0])), heads[-1])
        found.append(name)
        del parts[:len(parts) - heads.index(name)]
    return [name for name in found if name]


def source(name: str) -> tuple[str, str]:
    """("runs/a", "last") of "runs/a@last"; (name, "") of a name that exists, or that has no @."""
    folder, at, which = name.rpartition("@")
    return (folder, which) if at and not _is_there(name) else (name, "")


def _is_there(name: str) -> bool:
    return "://" not in name and os.path.exists(name)


@contextlib.contextmanager
def reached(where: str | os.PathLike, what: str) -> Iterator[None]:
    """For work in a bucket: what its libraries raise when it is not there, or the rights are missing, becomes a
    UserError that says `what` the path is. What a local path raises passes."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_remote(where):
            raise
        raise UserError(f"{what} {where} cannot be used ({first_line(error)}): expected a bucket that exists, and the "
                        "rights to list, read, write and delete what is in it") from None


def is_remote(where: str | os.PathLike) -> bool:
    """Whether a path is in a bucket, where nothing can be renamed at once."""
    return "://" in os.fspath(where)
