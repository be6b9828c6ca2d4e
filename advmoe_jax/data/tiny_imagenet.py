"""Tiny-ImageNet: 100,000 training and 10,000 validation images, 64x64, 200 classes (Stanford CS231N).

Validation images are what is tested on, as the test images have no labels. It is prepared from tiny-imagenet-200.zip,
or from the folder that it unpacks to.
"""

import pathlib

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import class_folders, images, records
from advmoe_jax.data.class_folders import Classes
from advmoe_jax.data.source import Dataset, Known, refuse_variant

_COUNTS = {"train": 100_000, "test": 10_000}
_NAME, _ANNOTATIONS = "tiny-imagenet-200", "val/val_annotations.txt"

Config, check, KNOWN = images.Config(image_size=64, resize=64, crop="pad"), images.check, Known(200)


def dataset(root: str, variant: str = "") -> Dataset:
    """Opens ROOT/tiny_imagenet/, which `python -m advmoe_jax.data.prepare tiny_imagenet` writes."""
    refuse_variant("tiny_imagenet", variant)
    return records.read("tiny_imagenet", root, Config)


def raw_images(path: pathlib.Path, variant: str, allow_unknown: bool) -> dict[str, Classes]:
    """What `data.prepare` reads: the zip archive, the folder it unpacks to, or what holds one of them.

    Args:
        path: the archive or folder.
        variant: must be empty.
        allow_unknown: accept other numbers of images than the official ones.
    Raises:
        UserError: it is something else, or parts are missing.
    """
    refuse_variant("tiny_imagenet", variant)
    for inside in (path / f"{_NAME}.zip", path / _NAME):
        path = inside if inside.exists() else path
    files = {item.name.removeprefix(f"{_NAME}/"): item for item in class_folders.items(path)}
    if _ANNOTATIONS not in files:
        raise UserError(f"nothing of tiny_imagenet in {path}: expected {_NAME}.zip, or the folder that it unpacks to")
    found = {"train": class_folders.by_class(item for name, item in files.items() if name.startswith("train/")),
             "test": {}}
    for line in files[_ANNOTATIONS].read().decode().splitlines():
        name, wnid = line.split("\t")[:2]
        if f"val/images/{name}" not in files:
            raise UserError(f"{path} lacks val/images/{name}, which {_ANNOTATIONS} names")
        found["test"].setdefault(wnid, []).append(files[f"val/images/{name}"])
    found["test"] = dict(sorted(found["test"].items()))
    class_folders.check_counts("tiny_imagenet", found, _COUNTS, allow_unknown)
    return found
