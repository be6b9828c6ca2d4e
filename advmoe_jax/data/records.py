"""Prepared image sets: ArrayRecord shards of encoded images, FOLDER/train-00000.array_record and so on.

Their index is meta.json: size, hash and labels of every shard. `data.shards` writes such folders.
"""

import bisect
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from advmoe_jax.core import paths
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import images
from advmoe_jax.data.source import META, Dataset, prepare_command

SCHEMA = "shards-1"


def place(name: str, root: str) -> pathlib.Path:
    """The prepared folder of a set: ROOT/NAME, or ROOT/VARIANT for what has a variant.

    Raises:
        UserError: it is in a bucket, or its name is no name of a folder.
    """
    base, _, variant = name.partition(":")
    folder = paths.path(root) / (variant or base)
    if paths.is_remote(folder) or "/" in variant or variant.startswith("."):
        raise UserError(f"{name} cannot be in {folder}, as its images are read one by one: expected data.dir on this "
                        "machine, and the name of a folder in it")
    return pathlib.Path(folder)


def command(name: str, root: str) -> str:
    """The command that prepares a set."""
    return f"{prepare_command(name, root)} --raw FOLDER"


def is_there(folder: pathlib.Path) -> bool:
    """Whether a folder is prepared, as far as its index says."""
    return (folder / META).is_file()


def read(name: str, root: str, view: images.Config) -> Dataset:
    """Opens a prepared folder. Nothing is read but the index.

    Args:
        name: of the data set.
        root: where prepared data is kept, on this machine.
        view: how images are cut unless the config says otherwise.
    Raises:
        UserError: there is none, or shards are missing or cut off.
    """
    folder, again = place(name, root), command(name, root)
    if not root or not is_there(folder):
        raise UserError(f"no prepared {name} {f'in {folder}' if root else 'anywhere: data.dir is empty'}; run "
                        f"`{again}`")
    index = read_index(folder)
    missing = [shard["file"] for shards in index["splits"].values() for shard in shards
               if size(folder / shard["file"]) != shard["bytes"]]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} shards, or parts of them: {', '.join(missing[:3])}"
                        f"{', ...' if missing[3:] else ''}; run `{again}`, which keeps the others")
    stores = {}
    for split, shards in index["splits"].items():
        counts = [len(shard["labels"]) for shard in shards]
        files = [_Part(str(folder / shard["file"]), 0, count, count) for shard, count in zip(shards, counts)]
        stores[split] = _store(name, files), np.concatenate([shard["labels"] for shard in shards])
    return images.opened(name, stores, tuple(index["class_names"]), view)


def read_index(folder):
    """What meta.json holds. Raises a UserError if it is damaged or of another layout."""
    try:
        index = json.loads((folder / META).read_text())
        if index["schema"] != SCHEMA:
            raise UserError(f"{folder} has layout {index['schema']!r}, expected {SCHEMA}; prepare the set again, with "
                            "--force")
        return index
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / META} is damaged: expected what data.prepare wrote; prepare the set again, with "
                        "--force") from None


def size(path: pathlib.Path) -> int:
    """Of a file, in bytes; -1 if there is none."""
    return path.stat().st_size if path.is_file() else -1


@dataclasses.dataclass(frozen=True)
class _Part:
    """A file and which of its records, as array_record asks for them: then it opens no file before it is read."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


@dataclasses.dataclass(frozen=True)
class Records:
    """A store (see `images.Store`) of the records of ArrayRecord files.

    Attributes:
        source: an ArrayRecordDataSource.
        files: their names.
        ends: how many records they hold up to the end of each.
    """

    source: Any
    files: tuple[str, ...]
    ends: tuple[int, ...]

    def read(self, number: int) -> bytes:
        try:
            return self.source[int(number)]
        except Exception as error:
            raise UserError(f"{self.where(number)} cannot be read ({' '.join(str(error).split())}): "
                            "prepare the data set again") from None

    def where(self, number: int) -> str:
        file = bisect.bisect_right(self.ends, number)
        return f"{self.files[file]}, record {number - (self.ends[file - 1] if file else 0)}"


def _store(name, parts):
    try:
        from array_record.python import array_record_data_source
    except ImportError:
        raise UserError(f"{name} needs array-record: run `pip install 'advmoe_jax[images]'`") from None
    return Records(array_record_data_source.ArrayRecordDataSource(parts), tuple(part.filename for part in parts),
                   tuple(itertools.accumulate(part.take for part in parts)))
