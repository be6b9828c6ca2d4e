"""What a data source gives back, and the prepared folder that it is kept in.

Legend: n images, H height, W width, C channels.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil

import numpy as np

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError, one_of

SCHEMA = 1
SPLITS = ("train", "test")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
META = "meta.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """An image classification data set, all of it in host memory.

    Attributes:
        name: what the config's `data.name` calls it.
        train_images: (n, H, W, C) uint8.
        train_labels: (n,) int32 in [0, num_classes).
        test_images: as `train_images`, with another n.
        test_labels: as `train_labels`.
        class_names: the name of each class, in label order.
    Raises:
        UserError: an array has another type or shape, or a label has no class.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self):
        for split in SPLITS:
            images, labels = self.split(split)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != self.image_shape:
                raise UserError(f"{self.name}: {split} images are {images.dtype} {images.shape}, "
                                f"expected uint8 (n, H, W, C) of one size in both splits")
            if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
                raise UserError(f"{self.name}: {split} labels are {labels.dtype} {labels.shape}, "
                                f"expected int32 {images.shape[:1]}")
            if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
                raise UserError(f"{self.name}: {split} labels are {labels.min()}..{labels.max()}, "
                                f"expected 0..{self.num_classes - 1}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train_images.shape[1:]

    def split(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of "train" or "test"."""
        one_of("split", split, SPLITS)
        return getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")

    def fingerprint(self, split: str) -> str:
        """sha256 in hex over a split's images, then its labels as little-endian int32."""
        images, labels = self.split(split)
        return files.fingerprint({"image": images, "label": labels.astype("<i4")})


def refuse_variant(name: str, variant: str):
    """Raises a UserError if a source that has no variants was given one (`cifar10:3.0.2`)."""
    if variant:
        raise UserError(f"{name} has no variant {variant!r}: expected '{name}'")


def prepare_command(name: str, root: str | os.PathLike) -> str:
    """The command that writes the prepared folder of `name` below `root`."""
    return f"python -m advmoe_jax.data.prepare {name} --out {root or 'DIR'}"


def read_prepared(name: str, root: str | os.PathLike) -> Dataset:
    """Reads ROOT/NAME/ and checks every file against the hash written beside it.

    Raises:
        UserError: the folder is missing (with the command that makes it), or a file is damaged.
    """
    folder = pathlib.Path(root) / name
    again = f"run `{prepare_command(name, root)}"
    if not root or not (folder / META).is_file():
        where = f"in {folder}" if root else "anywhere: data.dir is empty"
        raise UserError(f"no prepared {name} {where}; {again}`")
    try:
        meta = json.loads((folder / META).read_text())
        schema, class_names = meta["schema"], tuple(meta["class_names"])
        hashes = {array: meta["sha256"][f"{array}.npy"] for array in ARRAYS}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder / META} is damaged; {again} --force`") from None
    if schema != SCHEMA:
        raise UserError(f"{folder} has layout {schema!r}, expected {SCHEMA}; {again} --force`")
    arrays = {}
    for array, expected in hashes.items():
        path = folder / f"{array}.npy"
        if not path.is_file():
            raise UserError(f"{path} is missing; {again} --force`")
        found = _sha256(path)
        if found != expected:
            raise UserError(
                f"{path} is damaged: sha256 {found}, expected {expected}; {again} --force`")
        arrays[array] = np.load(path, mmap_mode=None, allow_pickle=False)
    return Dataset(name=name, class_names=class_names, **arrays)


def write_prepared(dataset: Dataset, root: str | os.PathLike) -> pathlib.Path:
    """Writes ROOT/NAME/ in place of a prepared folder that is there; never leaves half of it.

    Returns:
        The folder.
    Raises:
        UserError: the folder holds files that are not of a prepared data set.
    """
    folder = pathlib.Path(root) / dataset.name
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{dataset.name}.{os.getpid()}.{age}") for age in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir()
        for array in ARRAYS:
            np.save(new / f"{array}.npy", np.ascontiguousarray(getattr(dataset, array)))
        (new / META).write_text(json.dumps(_describe(dataset, new), indent=1) + "\n")
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return folder


def refuse_foreign(folder: pathlib.Path):
    """Raises a UserError if `folder` holds anything that `write_prepared` does not write."""
    ours = {META, *(f"{array}.npy" for array in ARRAYS)}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder or nothing; choose another --out")
    foreign = sorted(path.name for path in folder.glob("*") if path.name not in ours)
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]}, which is not of a prepared data set; "
                        "choose another --out")


def _describe(dataset, folder):
    return {
        "schema": SCHEMA,
        "name": dataset.name,
        "class_names": dataset.class_names,
        "shape": dataset.image_shape,
        "counts": {split: len(dataset.split(split)[1]) for split in SPLITS},
        "sha256": {f"{array}.npy": _sha256(folder / f"{array}.npy") for array in ARRAYS},
    }


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
