"""Folders and files by name, on this machine or in Google Cloud Storage."""

import importlib.util
import os

from etils import epath

from advmoe_jax.core.errors import UserError

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


def is_remote(where: str | os.PathLike) -> bool:
    """Whether a path is in a bucket, where nothing can be renamed at once."""
    return "://" in os.fspath(where)
