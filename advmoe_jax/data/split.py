"""What training and evaluation read images from, and how labelled examples are divided.

Legend: n examples of a split, B of a batch; H height, W width, C channels.
"""

import dataclasses
import functools
import hashlib
from typing import ClassVar, Protocol

import numpy as np

from advmoe_jax.core.errors import UserError

_CHUNK = 256  # examples that are hashed at once


class Split(Protocol):
    """Labelled images that are read by their number; they may be on disk.

    Attributes:
        labels: (n,) int32, in host memory.
        image_shape: (H, W, C).
        decodes: whether images are decoded as they are read. Training then has them drawn ahead, by
            `draw(row, generator)` of `images.Images`.
    """

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def decodes(self) -> bool: ...

    def __len__(self) -> int:
        """n."""

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads examples, on the host.

        Args:
            rows: (B,) int64 in [0, n), in any order, repeated or not.
        Returns:
            {"image": (B, H, W, C) uint8, "label": (B,) int32}.
        Raises:
            IndexError: there is no such row.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A split in host memory.

    Attributes:
        images: (n, H, W, C) uint8.
        labels: (n,) int32.
        name: what errors call it ("cifar10 train").
    Raises:
        UserError: an array has another type or shape.
    """

    images: np.ndarray
    labels: np.ndarray
    name: str = "a split"

    decodes: ClassVar[bool] = False

    def __post_init__(self):
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4:
            raise UserError(f"{self.name}: images are {images.dtype} {images.shape}, expected uint8 (n, H, W, C)")
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            raise UserError(f"{self.name}: labels are {labels.dtype} {labels.shape}, expected int32 {images.shape[:1]}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": self.images[rows], "label": self.labels[rows]}


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A part of another split.

    Attributes:
        whole: of N examples.
        rows: (n,) int64 in [0, N): which of them, in this order.
    """

    whole: Split
    rows: np.ndarray

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self.whole.labels[self.rows]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.whole.image_shape

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def decodes(self) -> bool:
        return self.whole.decodes

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.whole.take(self.rows[rows])

    def draw(self, row: int, generator: np.random.Generator) -> np.ndarray | None:
        return self.whole.draw(self.rows[row], generator)

    def where(self, row: int) -> str:
        return self.whole.where(self.rows[row])


def fingerprint(split: Split, rows: np.ndarray | None = None) -> str:
    """sha256 in hex over the images of `rows` (all if None), then their labels as little-endian int32."""
    rows = np.arange(len(split)) if rows is None else rows
    found = hashlib.sha256()
    for start in range(0, len(rows), _CHUNK):
        found.update(np.ascontiguousarray(split.take(rows[start:start + _CHUNK])["image"]))
    found.update(split.labels[rows].astype("<i4"))
    return found.hexdigest()


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Draws `count` examples, the same ones every time, each class in proportion to its size.

    Shares are rounded by largest remainder, ties to the lower label: exact to one example.

    Args:
        labels: (n,) integers.
        count: how many to draw, 0..n.
    Returns:
        (count,) int64 indices into `labels`, sorted.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares, remainders = np.divmod(count * sizes, max(len(labels), 1))
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(np.flatnonzero(labels == label))[:share]
             for label, share in zip(classes, shares)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
