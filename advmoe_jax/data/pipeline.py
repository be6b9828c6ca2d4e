"""From a data set's name to the batch of a step on the devices.

Which images a step sees is a pure function of (seed, stream, step): a resumed run needs no iterator
file. Legend: n examples of a split, B batch; H height, W width, C channels.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import find, paths, rng
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.data import images
from advmoe_jax.data.extra import Mixed
from advmoe_jax.data.source import Dataset
from advmoe_jax.data.split import Rows, Split, stratified
from advmoe_jax.ops import augment, idbh

_SMALL = 20_000
_PART = re.compile(r"\s*(\d{1,6}(?:\s*\+\s*\d{1,6})*)\s+of\s+(\d{1,6})\s*")


_IDBH = "idbh_"
AUGMENTS = ("crop", *(f"{_IDBH}{name}" for name in idbh.POLICIES))


def _is_padded(cfg: Any) -> bool:
    return getattr(cfg, "crop", "pad") == "pad"


_NOT_RESIZED = Only("images that are not cropped before, by data.crop=resized", lambda config: _is_padded(config.data))
_CROPPED = Only("data.augment=crop", lambda config: config.data.augment == "crop")
_MOVED = Only(f"{_CROPPED.when}, and {_NOT_RESIZED.when}", lambda config: (
    _CROPPED.holds(config) and _NOT_RESIZED.holds(config)))


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.data`."""

    name: str = setting("cifar10", "a module of advmoe_jax.data, or 'tfds:NAME'", room=("data", "dataset"))
    dir: str = setting("data", "where prepared data is")
    subset: int = setting(0, "keep the first so many training images; 0 for all", least=0, most=10**9)
    part: str = setting("", "train on parts of what is left of them: '0+2 of 4', the first and the third of four that "
                            "are drawn at random; empty: all", read=lambda value, name: _part(value, name))
    part_draw: str = setting("", "name of that draw: runs with one name and seed divide alike", only=Only(
        "a data.part", lambda config: bool(config.data.part)))
    extra: str = setting("", "an .npz of image and label, or several with commas, whose images are mixed in, such as "
                             "generated ones; none are held out, and an epoch stays one of the data set's images")
    extra_share: float = setting(0.7, "share of a batch that is of data.extra", above=0, most=0.999, only=Only(
        "a data.extra", lambda config: bool(config.data.extra)))
    batch_size: int = setting(128, "images of an iteration, on all devices together", least=1, most=10**6)
    augment: str = setting("crop", "how images are varied: by what the fields below say, or by IDBH of a strength, "
                                   "which moves them, changes colour or shape and erases", choices=AUGMENTS,
                           only=_NOT_RESIZED)
    pad: int = setting(4, "pixels that crops may move by", least=0, most=1024, only=_MOVED)
    flip: bool = setting(True, "whether half of the images are mirrored")
    jitter: float = setting(0.0, "how far brightness, contrast and saturation may change; 0: not at all", least=0,
                            most=1, only=_CROPPED)
    turn: float = setting(0.0, "degrees by which images may turn; 0: not at all", least=0, most=180, only=_CROPPED)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """What a run draws from.

    Attributes:
        train: the training images; perhaps with extra ones behind them, see `data.extra`.
        rows: (n,) int64, those of `train` that are trained on, of extra ones none.
        select: what the best checkpoint is chosen on: `train` or `test`.
        select_rows: (m,) int64, which of them; none is among `rows` if `select` is `train`.
        test: the test images.
        num_classes: K.
        image_shape: (H, W, C).
    """

    train: Split
    rows: np.ndarray
    select: Split
    select_rows: np.ndarray
    test: Split
    num_classes: int
    image_shape: tuple[int, int, int]


def load(cfg: Any, select_on: str, select_examples: int, seed: int = 0) -> Data:
    """Loads a data set and sets aside what chooses the best checkpoint.

    Args:
        cfg: `config.data`; see `open_dataset`.
        select_on: "validation", held out of the training images (see `holdout`), or "test".
        select_examples: at most so many of them choose.
        seed: of the run, for `data.part`.
    Raises:
        UserError: see `open_dataset` and `holdout`.
    """
    with paths.reached(cfg.dir, "data.dir"):
        dataset = open_dataset(cfg.name, cfg.dir, cfg.subset, cfg)
    train, test = dataset.train, dataset.test
    if select_on == "test":
        rows, select, select_rows = np.arange(len(train)), test, np.arange(len(test))
    else:
        select = train
        rows, select_rows = holdout(len(train), train.labels)
    rows = part_of(rows, getattr(cfg, "part", ""), seed, getattr(cfg, "part_draw", ""))
    return Data(train, rows, select, select_rows[:select_examples], test, dataset.num_classes, dataset.image_shape)


def part_of(rows: np.ndarray, part: str, seed: int, name: str = "") -> np.ndarray:
    """Some of the training images: a random draw divides them into parts, of equal sizes but for one image.

    Args:
        rows: (n,) of all.
        part: "0+2 of 4", which of how many; empty: all.
        seed, name: of the draw.
    Returns:
        (m,), in the order of `rows`.
    Raises:
        UserError: it cannot be read, or there are fewer images than parts.
    """
    if not part:
        return rows
    chosen, count = _part(part)
    if count > len(rows):
        raise UserError(f"data.part is {part!r}, and there are {len(rows)} training images: expected no more parts")
    parts = np.array_split(_permutation(len(rows), seed, f"part/{name}", 0), count)
    return rows[np.sort(np.concatenate([parts[number] for number in chosen]))]


def _part(text: str, name: str = "data.part") -> tuple[tuple[int, ...], int]:
    """The numbers of the parts, and of how many. Raises UserError for what cannot be read; "" is none of 1."""
    match = _PART.fullmatch(text)
    chosen, count = (tuple(map(int, match[1].split("+"))), int(match[2])) if match else ((), 1)
    if text and (not chosen or max(chosen) >= count or len(set(chosen)) < len(chosen)):
        raise UserError(f"{name} is {text!r}: expected different parts, counted from 0, and of how many, such as "
                        "'0+2 of 4'")
    return chosen, count


def known(cfg: Any) -> tuple[tuple[int, int, int] | None, int | None]:
    """(H, W, C) and K of the images that `config.data` names, without their files; None for what only these say."""
    module = find.module("data", cfg.name.partition(":")[0], defines="dataset", kind="data.name")
    if not hasattr(module, "KNOWN"):
        return None, None
    return module.KNOWN.image_shape or (cfg.image_size, cfg.image_size, 3), module.KNOWN.num_classes


def of_images(cfg: Any) -> tuple[tuple[int, int, int], int]:
    """(H, W, C) and K as `known`, and where only the files say them by these. Raises UserError as `open_dataset`."""
    shape, classes = known(cfg)
    if shape is None or classes is None:
        dataset = open_dataset(cfg.name, cfg.dir, view=cfg)
        shape, classes = dataset.image_shape, dataset.num_classes
    return shape, classes


def open_dataset(name: str, root: str, subset: int = 0, view: Any = None) -> Dataset:
    """Loads a data set.

    Args:
        name: a source's module name, with a variant after a colon if it has any ("tfds:cifar10").
        root: where prepared data is (`config.data.dir`), local or gs://.
        subset: keep only the first so many training images; 0 keeps all.
        view: has the fields of `images.Config` if the images are decoded as they are read; None: the source's defaults.
    Raises:
        UserError: unknown name, data missing or damaged, or a subset larger than the set.
    """
    source, _, variant = name.partition(":")
    module = find.module("data", source, defines="dataset", kind="data.name")
    dataset = module.dataset(root, variant)
    if not isinstance(dataset, Dataset):
        raise UserError(f"dataset() of advmoe_jax/data/{source}.py returns {type(dataset).__name__}: expected a "
                        "Dataset")
    if view is not None and hasattr(module, "Config"):
        dataset = images.seen(dataset, view, module.Config)
    num_train = len(dataset.train)
    if not 0 <= subset <= num_train:
        raise UserError(f"data.subset is {subset}, but {name} has {num_train} training images: "
                        f"expected 0 (all) to {num_train}")
    if not subset:
        return dataset
    return dataclasses.replace(dataset, train=Rows(dataset.train, np.arange(subset)))


def holdout(num_train: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sets training images aside for validation.

    10 % of up to 20,000 images, of more the larger of 2 % and 1,000. Every class gives its share;
    the choice depends on the labels alone, never on a seed.

    Args:
        num_train: n, at least 2.
        labels: (n,) integers.
    Returns:
        Training and validation indices: int64, sorted, disjoint, together 0..n-1.
    """
    if num_train < 2 or np.shape(labels) != (num_train,):
        raise UserError(f"cannot hold out validation images of {num_train} with labels of shape "
                        f"{np.shape(labels)}: expected at least 2 images and as many labels")
    if num_train <= _SMALL:
        count = max(1, round(0.1 * num_train))
    else:
        count = max(1_000, round(0.02 * num_train))
    val = stratified(np.asarray(labels), count)
    return np.setdiff1d(np.arange(num_train), val), val


def steps_per_epoch(num_train: int, batch_size: int) -> int:
    """Whole batches in one pass; the rest of a pass is left out.

    Raises:
        UserError: `batch_size` is below 1 or above `num_train`.
    """
    if not 1 <= batch_size <= num_train:
        raise UserError(f"batch size is {batch_size}, but there are {num_train} training images: "
                        f"expected 1 to {num_train}")
    return num_train // batch_size


def batch_indices(indices: np.ndarray, batch_size: int, seed: int, stream: str,
                  step: int) -> np.ndarray:
    """The examples of one training step, without replacement within an epoch.

    Args:
        indices: (n,) the examples to draw from.
        batch_size: B, at most n.
        seed: the run's seed.
        stream: what the batch is for; streams are independent of each other.
        step: from 0.
    Returns:
        (B,) int64, a part of `indices`.
    """
    epoch, position = divmod(step, steps_per_epoch(len(indices), batch_size))
    order = _permutation(len(indices), seed, stream, epoch)
    return np.asarray(indices, np.int64)[order[position * batch_size:(position + 1) * batch_size]]


def batch_rows(split: Split, indices: np.ndarray, batch_size: int, seed: int, stream: str, step: int) -> np.ndarray:
    """The rows of `split` that a training step sees, (B,) int64: `batch_indices`; or, if there are extra images, fewer
    of them, in passes that are as much longer, and then their share. Arguments as `batch_indices`."""
    if not isinstance(split, Mixed):
        return batch_indices(indices, batch_size, seed, stream, step)
    own = batch_indices(indices, batch_size - split.count(batch_size), seed, stream, step)
    return np.concatenate([own, split.draw(batch_size, seed, stream, step)])


def images_of(split: Split, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images as numpy, (B, H, W, C) float32 in [0, 1], and their labels (B,)."""
    batch = split.take(rows)
    return np.asarray(augment.to_float(jnp.asarray(batch["image"]))), batch["label"]


def padding(cfg: Any) -> int:
    """Pixels that crops move by on the device: data.pad, or 0 for images that were cropped at random before, or are
    moved by IDBH."""
    return cfg.pad if _is_padded(cfg) and policy(cfg) is None else 0


def policy(cfg: Any) -> idbh.Policy | None:
    """That of data.augment; None: it is none of IDBH."""
    return idbh.POLICIES.get(getattr(cfg, "augment", AUGMENTS[0]).removeprefix(_IDBH))


def padded_batches(indices: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All examples in order, in batches of one size, for evaluation.

    Yields:
        Indices (B,) int64 and a mask (B,) bool. A short last batch is not dropped: it is filled up
        with its own first index, masked False.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: expected 1 or more")
    for start in range(0, len(indices), batch_size):
        part = np.asarray(indices[start:start + batch_size], np.int64)
        padding = batch_size - len(part)
        yield np.pad(part, (0, padding), constant_values=part[0]), np.arange(batch_size) < len(part)


def device_batch(mesh: jax.sharding.Mesh, split: Split, rows: np.ndarray) -> dict[str, jax.Array]:
    """A global batch on the devices, of which this process reads only its own rows.

    Args:
        mesh: of all devices.
        split: what to read.
        rows: (B,) integers in [0, n), the same in all processes; B is a multiple of the devices.
    Returns:
        {"image": (B, H, W, C) uint8, "label": (B,) int32, "index": (B,) int32, which is `rows`}, cut over the devices.
    """
    mine = np.asarray(of_this_process(rows), np.int64)
    return on_devices(mesh, split.take(mine) | {"index": mine.astype(np.int32)})


def of_this_process(rows: np.ndarray) -> np.ndarray:
    """The part of a global batch (B, ...), a multiple of the processes, that this process reads."""
    share = len(rows) // jax.process_count()
    return rows[jax.process_index() * share:(jax.process_index() + 1) * share]


def on_devices(mesh: jax.sharding.Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A global batch of this process's part: arrays (B / processes, ...), cut over the devices."""
    sharding = meshes.by_example(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in local.items()}


@functools.lru_cache(maxsize=8)
def _permutation(n, seed, stream, epoch):
    order = rng.on_host(seed, stream, epoch).permutation(n)
    order.setflags(write=False)
    return order
