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

from advmoe_jax.core import console, paths
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.files import write_bytes
from advmoe_jax.data import images as encoded
from advmoe_jax.data.source import Dataset, in_memory

_TEST_SPLITS = ("test", "validation")
Config, check = encoded.Config(crop="pad"), encoded.check


def dataset(root: str, variant: str = "") -> Dataset:
    """Reads the splits `train` and `test` in the order of their records.

    `validation` stands in for a test split that is absent or whose labels are hidden. Encoded images that differ in
    size are decoded as they are read, see `images.Images`; others are kept in memory.

    Args:
        root: the folder of tensorflow-datasets (its `data_dir`); its own default if empty.
        variant: the name of the data set.
    Raises:
        UserError: unknown, damaged, not prepared as ArrayRecord, no such splits or features, or images that
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
        label = features["label"] if "label" in features else None
        class_names = getattr(label, "names", None)
        if not class_names or label.shape:
            raise UserError(f"tfds:{variant} has no feature 'label' with one of named classes for an image")
        tests = [split for split in _TEST_SPLITS if split in builder.info.splits] or ["test"]
        stays = _stays_encoded(features)
        read = _store if stays else _read
        train, test = (read(builder, split, variant, root) for split in ("train", tests[0]))
        if test[1].min() < 0 and len(tests) > 1:
            console.warn(f"tfds:{variant} hides the labels of {tests[0]!r}: {tests[1]!r} stands in for it")
            test = read(builder, tests[1], variant, root)
        found = f"tfds:{variant}", {"train": train, "test": test}, tuple(class_names)
        return encoded.opened(*found, Config) if stays else in_memory(*found)


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
    except Exception as error:  # what its parsers of damaged files raise has no common base class
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"tfds:{variant} in {root or 'its default folder'} cannot be read: {reason}") from None


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
        try:
            return bytes(self.source[int(number)]["image"])
        except Exception:  # as in _records
            raise UserError(f"{self.where(number)} is damaged: prepare the set anew") from None

    def where(self, number: int) -> str:
        return f"{self.name}, record {number}"


def _stays_encoded(features):
    from tensorflow_datasets import features as kinds
    return "image" in features and isinstance(features["image"], kinds.Image) and None in features["image"].shape


def _store(builder, split, variant, root):
    """A store and its labels (n,) int32, which are read once, record by record, and kept beside the records if that is
    allowed."""
    from tensorflow_datasets import decode
    decoders = {"image": decode.SkipDecoding()}
    records = _records(builder, split, variant, root, decoders=decoders)
    kept = pathlib.Path(builder.data_dir) / f"labels-{split}.npy"
    labels = np.load(kept) if kept.is_file() else np.zeros(0, np.int32)
    if len(labels) != builder.info.splits[split].num_examples:
        labels, content = np.array([label for _, label in records], np.int32), io.BytesIO()
        np.save(content, labels)
        with contextlib.suppress(OSError):
            write_bytes(kept, content.getvalue())
    return Records(builder.as_data_source(split=split, decoders=decoders), f"tfds:{variant} {split}"), labels


def _read(builder, split, variant, root):
    """Images (n, H, W, C) uint8 and labels (n,) int32."""
    images, labels, sizes = [], [], set()
    for image, label in _records(builder, split, variant, root):
        sizes.add(image.shape)
        images.append(image)
        labels.append(label)
    if len(sizes) > 1:
        raise UserError(f"tfds:{variant}: {split} images differ in size ({min(sizes)} and {max(sizes)}): "
                        "expected one size")
    return np.stack(images), np.asarray(labels, np.int32)


def _records(builder, split, variant, root, **options):
    """An iterator over image and label of every record, as `builder.as_data_source` gives them.

    Raises:
        UserError: at once if there is no such split or feature or a shard is missing; later for damaged shards.
    """
    name, info = f"tfds:{variant}", builder.info
    if split not in info.splits:
        raise UserError(f"{name} has no split {split!r}: it has {', '.join(info.splits)}")
    if "image" not in info.features:
        raise UserError(f"{name} has no feature 'image': it has {', '.join(sorted(info.features))}")
    if not info.splits[split].num_examples:
        raise UserError(f"{name}: split {split!r} is empty")
    lost = f"delete {builder.data_dir} and prepare it anew; {how_to_prepare(root, variant)}"
    for shard in info.splits[split].filepaths:
        if not shard.exists():
            raise UserError(f"{shard} is missing: {lost}")

    def records():
        for number, shard in enumerate(info.splits[split].filepaths):
            part = f"{split}[{number}shard]"
            try:
                for record in builder.as_data_source(split=part, **options) if info.splits[part].num_examples else ():
                    image, label = record["image"], int(record["label"])
                    yield image, label
            except NotImplementedError:
                raise UserError(f"{name} in {builder.data_dir} is not in ArrayRecord format; "
                                f"{how_to_prepare(root, variant)}") from None
            except ImportError as error:
                raise UserError(f"{name}: decoding its images needs {error.name}, "
                                "which is not installed") from None
            except Exception:  # of a damaged record the library gives None, or raises what its decoder raised
                raise UserError(f"{shard} is damaged: {lost}") from None

    return records()


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
