"""Images beside those of a data set, such as a diffusion model makes, of which every training batch has a share.

A file is an .npz with "image" (N, H, W, C) uint8 and "label" (N,) integers, as Rebuffi et al. (NeurIPS 2021) and Wang
et al. (ICML 2023) publish theirs. What np.savez wrote, which does not compress, is not read but mapped into memory, so
that a file may be larger than it; a compressed array is read whole.

N extra images, n of the data set, B batch; H height, W width, C channels.
"""

import dataclasses
import functools
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.lib import format as npy

from advmoe_jax.core import paths, rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.data.split import Arrays, Split

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_LOCAL_HEADER = 30  # bytes of a zip member before its name; the lengths of what follows stand in the last four


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
    """A split with extra images behind it.

    Attributes:
        whole: the data set's n training images, rows 0 to n - 1.
        extra: files of N images together, the rows from n on.
        share: of a batch that is extra, above 0 and below 1, rounded to whole images.
    """

    whole: Split
    extra: tuple[Split, ...]
    share: float

    decodes: ClassVar[bool] = False

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return np.concatenate([part.labels for part in (self.whole, *self.extra)])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.whole.image_shape

    def __len__(self) -> int:
        return int(self._starts[-1])

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, len(self.whole), *map(len, self.extra)])

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.asarray(rows)
        if np.any((rows < 0) | (rows >= len(self))):
            raise IndexError(f"row {rows.min()} or {rows.max()} of {len(self)}")
        images, labels = np.empty((len(rows), *self.image_shape), np.uint8), np.empty(len(rows), np.int32)
        for part, start, end in zip((self.whole, *self.extra), self._starts, self._starts[1:]):
            places = np.flatnonzero((rows >= start) & (rows < end))
            found = part.take(rows[places] - start)
            images[places], labels[places] = found["image"], found["label"]
        return {"image": images, "label": labels}

    def count(self, batch_size: int) -> int:
        """Extra images of a batch."""
        return round(self.share * batch_size)

    def draw(self, batch_size: int, seed: int, stream: str, step: int) -> np.ndarray:
        """The rows of the extra images of a batch, (count,) int64, drawn with replacement, as Carmon et al. (NeurIPS
        2019) and their followers do. A function of (seed, stream, step)."""
        return rng.on_host(seed, f"{stream}/extra", step).integers(len(self.whole), len(self), self.count(batch_size))


def about(cfg: Any) -> str:
    """What reports call it, "extra data: 1m.npz 70 %"; "" if there is none."""
    if not getattr(cfg, "extra", ""):
        return ""
    names = ", ".join(Path(name).name for name in paths.listed(cfg.extra))
    return f"extra data: {names} {100 * cfg.extra_share:.3g} %"


def marked(name: str, extra_data: str) -> str:
    """A row's or a run's name with what `about` says of its extra data, if it has any."""
    return f"{name} ({extra_data})" if extra_data else name


def mixed(cfg: Any, train: Split, num_classes: int) -> Split:
    """The training images with those of `data.extra`; as they are if it names nothing.

    Args:
        cfg: `config.data`: fields extra, extra_share and batch_size.
        train: of the data set.
        num_classes: of its labels.
    Raises:
        UserError: a file cannot be read, or does not fit; the share leaves a batch without images of one of both.
    """
    if not cfg.extra:
        return train
    if train.decodes:
        raise UserError(f"data.extra is {cfg.extra!r}: expected nothing with data.name={cfg.name}, whose images are "
                        "decoded as they are read")
    found = Mixed(train, tuple(_opened(name, train.image_shape, num_classes) for name in paths.listed(cfg.extra)),
                  cfg.extra_share)
    if not 0 < found.count(cfg.batch_size) < cfg.batch_size:
        raise UserError(f"data.extra_share is {cfg.extra_share}, {found.count(cfg.batch_size)} images of a batch of "
                        f"{cfg.batch_size}: expected at least one extra image, and one of {cfg.name}")
    return found


def _opened(name: str, image_shape: Sequence[int], num_classes: int) -> Arrays:
    what, path = f"data.extra {name}", Path(name)
    if paths.is_remote(name) or not path.is_file():
        raise UserError(f"{what}: there is no such file on this machine: expected an .npz with image and label")
    try:
        images, labels = (_member(path, key) for key in ("image", "label"))
    except KeyError as error:
        raise UserError(f"{what} has no array {error.args[0]!r}: expected image (N, H, W, C) and label (N,)") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{what} is damaged or no .npz: expected what np.savez writes of image (N, H, W, C) and label "
                        "(N,)") from None
    if images.dtype != np.uint8 or images.shape[1:] != tuple(image_shape) or not len(images):
        raise UserError(f"{what}: image is {images.dtype} {images.shape}: expected uint8 (N, "
                        f"{', '.join(map(str, image_shape))}) as the data set has")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(f"{what}: label is {labels.dtype} {labels.shape}: expected integers {images.shape[:1]}")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{what}: labels are {labels.min()}..{labels.max()}: expected 0..{num_classes - 1}")
    return Arrays(images, labels.astype(np.int32), what)


def _member(path: Path, key: str) -> np.ndarray:
    """An array of an .npz: mapped into memory if it is stored as it is, else read.

    Raises:
        KeyError: there is none of that name.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{key}.npy" not in archive.namelist():
            raise KeyError(key)
        info = archive.getinfo(f"{key}.npy")
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(info.header_offset)
            local = file.read(_LOCAL_HEADER)
            file.seek(int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little"), 1)
            if read := _HEADERS.get(npy.read_magic(file)):
                shape, is_fortran, dtype = read(file)
                if dtype.hasobject:
                    raise ValueError("an array of objects")
                if all(shape):
                    mapped = np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")
                    return np.asarray(mapped)
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[key]
