"""Any images in class folders: data.dir/train/CLASS/ and data.dir/val/CLASS/ (or test/), read as they lie there.

With a variant, "imagefolder:NAME", the folder is data.dir/NAME; it may also be prepared, from class folders or tar
archives of them, which is faster where there are many files.
"""

import dataclasses
import os
import pathlib

import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import class_folders, images, records
from advmoe_jax.data.class_folders import Classes
from advmoe_jax.data.source import Dataset, Known

Config, check, KNOWN = images.Config(), images.check, Known()


def dataset(root: str, variant: str = "") -> Dataset:
    """Lists the files, or opens the prepared folder.

    Args:
        root: `data.dir`, on this machine.
        variant: a folder in it; "" for itself.
    Raises:
        UserError: no class folders there, or those of train and val do not agree; or see `records.read`.
    """
    name = f"imagefolder:{variant}" if variant else "imagefolder"
    folder = records.place(name, root) if variant else pathlib.Path(root)
    if variant and (records.is_there(folder) or not (folder / "train").is_dir()):
        return records.read(name, root, Config)
    found = class_folders.splits(folder, archives=False)
    class_folders.check(str(folder), found)
    stores = {split: (Files(np.array([os.fsencode(item.file) for of in classes.values() for item in of])),
                      np.repeat(np.arange(len(classes)), [len(of) for of in classes.values()]))
              for split, classes in found.items()}
    return images.opened(name, stores, tuple(found["train"]), Config)


def raw_images(path: pathlib.Path, variant: str, allow_unknown: bool) -> dict[str, Classes]:
    """What `data.prepare` reads: a folder with train and val (or test), folders or tar archives of class folders.

    Raises:
        UserError: no name for the set, or see `class_folders.splits`.
    """
    del allow_unknown
    if not variant:
        raise UserError("imagefolder is read as it is; to prepare it, give it a name: expected imagefolder:NAME")
    return class_folders.splits(path)


@dataclasses.dataclass(frozen=True, eq=False)
class Files:
    """A store (see `images.Store`) of files.

    Attributes:
        names: (n,) bytes; as an array they take little memory.
    """

    names: np.ndarray

    def read(self, number: int) -> bytes:
        return pathlib.Path(self.where(number)).read_bytes()

    def where(self, number: int) -> str:
        return os.fsdecode(bytes(self.names[number]))
