"""What a data source gives back, and the prepared folder that it is kept in.

Legend: n images, H height, W width, C channels.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core import paths
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.data import split as splits
from advmoe_jax.data.split import Arrays, Split

SCHEMA = 1
SPLITS = ("train", "test")
META = "meta.json"
_FILES = tuple(f"{split}_{array}.npy" for split in SPLITS for array in ("images", "labels"))
_AGES = ("new", "old")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """An image classification data set.

    Attributes:
        name: what the config's `data.name` calls it.
        train: training images, with labels in [0, num_classes).
        test: as `train`, with another n.
        class_names: the name of each class, in label order.
    Raises:
        UserError: a split is empty, the splits have images of two sizes, or a label has no class.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]

    def __post_init__(self):
        if self.train.image_shape != self.test.image_shape:
            raise UserError(f"{self.name}: train images are {self.train.image_shape} and test images "
                            f"{self.test.image_shape}, expected (H, W, C) of one size in both splits")
        for split in SPLITS:
            labels = self.split(split).labels
            if not len(labels):
                raise UserError(f"{self.name} has no {split} images: expected at least one")
            if not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise UserError(f"{self.name}: {split} labels are {labels.min()}..{labels.max()}, "
                                f"expected 0..{self.num_classes - 1}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train.image_shape

    def split(self, split: str) -> Split:
        """The split "train" or "test"."""
        return getattr(self, one_of("split", split, SPLITS))

    def fingerprint(self, split: str) -> str:
        """sha256 in hex over a split's images, then its labels as little-endian int32."""
        return splits.fingerprint(self.split(split))


@dataclasses.dataclass(frozen=True)
class Known:
    """What a source's name says of its images, without the files: `KNOWN` of its module.

    Attributes:
        num_classes: K; None: the files say it.
        image_shape: (H, W, C); None: of the size that `data.image_size` has.
    """

    num_classes: int | None = None
    image_shape: tuple[int, int, int] | None = None


def in_memory(name: str, arrays: dict[str, tuple[np.ndarray, np.ndarray]], class_names: tuple[str, ...]) -> Dataset:
    """A data set of {split: (images, labels)}; see `split.Arrays`."""
    return Dataset(name, *(Arrays(*arrays[split], f"{name} {split}") for split in SPLITS), class_names)


def refuse_variant(name: str, variant: str):
    """Raises a UserError if a source that has no variants was given one (`cifar10:3.0.2`)."""
    if variant:
        raise UserError(f"{name} has no variant {variant!r}: expected '{name}'")


def prepare_command(name: str, root: str | os.PathLike) -> str:
    """The command that writes the prepared folder of `name` below `root`."""
    return f"python -m advmoe_jax.data.prepare {name} --out {root or 'DIR'}"


def read_prepared(name: str, root: str | os.PathLike, variant: str = "") -> Dataset:
    """Reads ROOT/NAME/ into memory and checks every file against the hash written beside it.

    Args:
        name: the data set.
        root: where prepared data is kept, local or gs://.
        variant: must be empty.
    Raises:
        UserError: the folder is missing (with the command that makes it), or a file is damaged.
    """
    refuse_variant(name, variant)
    folder = paths.path(root) / name
    again = f"run `{prepare_command(name, root)}"
    if not root or not (folder / META).is_file():
        where = f"in {folder}" if root else "anywhere: data.dir is empty"
        raise UserError(f"no prepared {name} {where}; {again}`")
    try:
        meta = json.loads((folder / META).read_text())
        schema, class_names = meta["schema"], tuple(meta["class_names"])
        hashes = {file: meta["sha256"][file] for file in _FILES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{folder / META} is damaged; {again} --force`") from None
    if schema != SCHEMA:
        raise UserError(f"{folder} has layout {schema!r}, expected {SCHEMA}; {again} --force`")
    arrays = []
    for file, expected in hashes.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing; {again} --force`")
        found = sha256(path)
        if found != expected:
            raise UserError(
                f"{path} is damaged: sha256 {found}, expected {expected}; {again} --force`")
        try:
            with path.open("rb") as opened:
                arrays.append(np.load(opened, allow_pickle=False))
        except Exception:  # numpy raises what its parser of headers raised, a MemoryError included
            raise UserError(f"{path} is damaged: it holds no array; {again} --force`") from None
    try:
        return in_memory(name, {"train": arrays[:2], "test": arrays[2:]}, class_names)
    except UserError as error:
        raise UserError(f"{folder} is damaged: {error}; {again} --force`") from None


def write_prepared(dataset: Dataset, root: str | os.PathLike) -> epath.Path:
    """Writes ROOT/NAME/ in place of a prepared folder that is there.

    A local folder is replaced at once. In a bucket meta.json goes first and comes last: half a folder has none.

    Returns:
        The folder.
    Raises:
        UserError: the folder holds files that are not of a prepared data set.
        OSError: the disk is full or cannot be written; what was there is as it was.
    """
    folder = paths.path(root) / dataset.name
    refuse_foreign(folder)
    if paths.is_remote(folder):
        with tempfile.TemporaryDirectory() as new:
            _fill(epath.Path(new), dataset)
            (folder / META).unlink(missing_ok=True)
            for file in (*_FILES, META):
                (epath.Path(new) / file).copy(folder / file, overwrite=True)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    new, old = (folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}.{age}") for age in _AGES)
    try:
        new.mkdir()
        _fill(new, dataset)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def remove_unfinished(folder: epath.Path) -> None:
    """Removes what killed processes of this machine left beside a prepared folder; what they set aside comes back."""
    if paths.is_remote(folder):
        return
    for left in folder.parent.glob(f".{folder.name}.{socket.gethostname()}.*"):
        *_, pid, age = left.name.split(".")
        if age not in _AGES or not pid.isdigit() or _is_alive(int(pid)):
            continue
        if age == "old" and not folder.exists():
            os.replace(left, folder)
        shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid):
    """Whether another process has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return pid != os.getpid()


@contextlib.contextmanager
def writing(folder: os.PathLike, size: int) -> Iterator[None]:
    """Writes about `size` bytes into a local folder.

    Raises:
        OSError: the disk has less room, which is said before, or the system refuses a write. It names both.
    """
    what, free = f"{size / 1e6:,.1f} MB", shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"no room for {what}: its disk has {free / 1e6:,.1f} MB free", str(folder))
    try:
        yield
    except OSError as error:
        code = error.errno or errno.EIO
        raise OSError(code, f"{what} were to be written: {error.strerror or error}", str(folder)) from None


def refuse_foreign(folder: epath.Path, is_ours: Callable[[str], Any] = (META, *_FILES).__contains__) -> None:
    """Raises a UserError if `folder` holds anything that a prepared one does not, by its name."""
    if folder.is_file():
        raise UserError(f"{folder} is a file, expected a folder or nothing; choose another --out")
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if foreign := sorted(name for name in there if not is_ours(name)):
        raise UserError(f"{folder} holds {foreign[0]}, which is not of a prepared data set; "
                        "choose another --out")


def _fill(folder, dataset):
    """Writes all files of a prepared folder, which is local."""
    parts = [dataset.split(split) for split in SPLITS]
    with writing(folder.parent, sum(len(part) * (math.prod(part.image_shape) + 4) for part in parts)):
        for split, part in zip(SPLITS, parts):
            batch = part.take(np.arange(len(part)))
            for array in ("image", "label"):
                # Open for reading too: only then numpy passes on why the system refuses a write.
                with open(folder / f"{split}_{array}s.npy", "w+b") as file:
                    np.save(file, np.ascontiguousarray(batch[array]))
        meta = {
            "schema": SCHEMA,
            "name": dataset.name,
            "class_names": dataset.class_names,
            "shape": dataset.image_shape,
            "counts": {split: len(part) for split, part in zip(SPLITS, parts)},
            "sha256": {file: sha256(folder / file) for file in _FILES},
        }
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n")


def sha256(path: epath.PathLike) -> str:
    """Of a file's content, in hex; "" if there is no such file."""
    path = epath.Path(path)
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
