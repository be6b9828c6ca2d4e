"""Any classification set that tensorflow-datasets prepared as ArrayRecord; needs no TensorFlow.

`data.name` is "tfds:NAME", with NAME as tensorflow-datasets writes it ("cifar10", "cifar10:3.0.2").
"""

import contextlib
import dataclasses
import difflib
import io
import logging
import pathlib
from typing import Any

import numpy as np

from advmoe_jax.core import paths
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.files import write_bytes
from advmoe_jax.data import images as encoded
from advmoe_jax.data.source import Dataset, in_memory

_TEST_SPLITS = ("test", "validation")
Config, check = encoded.Config(crop="pad"), encoded.check


def dataset(root: str, variant: str = "") -> Dataset:
    """Reads the splits `train` and `test` (or `validation`) in the order of their records.

    Encoded images that differ in size are decoded as they are read, see `images.Images`; others are kept in memory.

    Args:
        root: the folder of tensorflow-datasets (its `data_dir`); its own default if empty.
        variant: the name of the data set.
    Raises:
        UserError: unknown, not prepared as ArrayRecord, no such splits or features, or images that
            are not uint8 of one size.
    """
    if not variant:
        raise UserError("data.name is 'tfds': expected a data set after it, such as 'tfds:cifar10'")
    with _quiet():
        builder = _builder(variant, root)
        if not builder.info.splits:
            raise UserError(f"no prepared tfds:{variant} in {builder.data_dir}; "
                            f"{how_to_prepare(root, variant)}")
        features = builder.info.features
        class_names = getattr(features["label"] if "label" in features else None, "names", None)
        if not class_names:
            raise UserError(f"tfds:{variant} has no feature 'label' with named classes")
        test = next((split for split in _TEST_SPLITS if split in builder.info.splits), "test")
        if _differ_in_size(features):
            stores = {of: _store(builder, split, variant, root) for of, split in (("train", "train"), ("test", test))}
            return encoded.opened(f"tfds:{variant}", tuple(class_names), stores, Config)
        arrays = {"train": _read(builder, "train", variant, root), "test": _read(builder, test, variant, root)}
        return in_memory(f"tfds:{variant}", arrays, tuple(class_names))


def how_to_prepare(root: str, variant: str = "") -> str:
    """What to tell a person who wants to prepare this source."""
    folder = f" --data_dir={root}" if root else ""
    return ("tensorflow-datasets prepares it, once, with TensorFlow: "
            "`pip install tensorflow`, "
            f"then `tfds build {variant or 'NAME'}{folder} --file_format=array_record`")


def _builder(variant, root):
    try:
        import tensorflow_datasets
    except ImportError:
        raise UserError(f"data.name 'tfds:{variant}' needs tensorflow-datasets: "
                        "run `pip install advmoe_jax[tfds]`") from None
    try:
        return tensorflow_datasets.builder(variant, data_dir=paths.path(root) if root else None)
    except tensorflow_datasets.core.DatasetNotFoundError:
        known = tensorflow_datasets.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(variant, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"tensorflow-datasets has no {variant!r}, neither by name nor in "
                        f"{root or 'its default folder'}{hint}") from None
    except (ValueError, AssertionError) as error:
        raise UserError(f"tfds:{variant}: {str(error).splitlines()[0]}") from None


@dataclasses.dataclass(frozen=True)
class Records:
    """A store (see `images.Store`) of what tensorflow-datasets reads.

    Attributes:
        source: of records whose images are not decoded.
        name: of the split.
    """

    source: Any
    name: str

    def read(self, number: int) -> bytes:
        return bytes(self.source[int(number)]["image"])

    def where(self, number: int) -> str:
        return f"{self.name}, record {number}"


def _differ_in_size(features):
    from tensorflow_datasets import features as kinds
    return "image" in features and isinstance(features["image"], kinds.Image) and None in features["image"].shape


def _store(builder, split, variant, root):
    """A store and its labels, which are read once, record by record, and kept beside the records if that is allowed."""
    from tensorflow_datasets import decode
    records = _records(builder, split, variant, root, decoders={"image": decode.SkipDecoding()})
    kept = pathlib.Path(builder.data_dir) / f"labels-{split}.npy"
    labels = np.load(kept) if kept.is_file() else np.zeros(0)
    if len(labels) != len(records):
        labels = np.array([record["label"] for record in records], np.int32)
        content = io.BytesIO()
        np.save(content, labels)
        with contextlib.suppress(OSError):
            write_bytes(kept, content.getvalue())
    return Records(records, f"tfds:{variant} {split}"), labels


def _records(builder, split, variant, root, **options):
    """The records of a split, as `builder.as_data_source` gives them."""
    name, info = f"tfds:{variant}", builder.info
    if split not in info.splits:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(info.splits)}")
    if "image" not in info.features:
        raise UserError(f"{name} has no feature 'image': it has {', '.join(sorted(info.features))}")
    if not info.splits[split].num_examples:
        raise UserError(f"{name}: split {split!r} is empty")
    try:
        return builder.as_data_source(split=split, **options)
    except NotImplementedError:
        raise UserError(f"{name} in {builder.data_dir} is not in ArrayRecord format; "
                        f"{how_to_prepare(root, variant)}") from None


def _read(builder, split, variant, root):
    """Returns images (n, H, W, C) uint8 and labels (n,) int32."""
    name = f"tfds:{variant}"
    try:
        records = _records(builder, split, variant, root)
        images, labels = zip(*((record["image"], record["label"]) for record in records))
    except ImportError as error:
        raise UserError(f"{name}: decoding its images needs {error.name}, "
                        "which is not installed") from None
    sizes = sorted({image.shape for image in images})
    if len(sizes) > 1:
        raise UserError(f"{name}: {split} images differ in size ({sizes[0]} and {sizes[-1]}): "
                        "expected one size")
    return np.stack(images), np.asarray(labels, np.int32)


@contextlib.contextmanager
def _quiet():
    """Keeps absl, which tensorflow-datasets logs through, to errors."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
