"""Images that stay encoded, in files or records, and are decoded as they are read.

n images of a split, B of a batch, S pixels of a side.
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
from typing import Any, ClassVar, Protocol

import numpy as np

from advmoe_jax.core import console
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.data.source import SPLITS, Dataset

_RATIO, _TRIES = (3 / 4, 4 / 3), 10  # of a random part; torchvision's
_RESIZED = Only("data.crop=resized", lambda config: config.data.crop == "resized")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.data` for such images. A source that has them defines `Config`, an instance, and `check`."""

    image_size: int = setting(224, "pixels of a side", least=8, most=4096)
    resize: int = setting(256, "pixels of the shorter side; evaluation takes the centre of the image then", least=8,
                          most=4096)
    crop: str = setting("resized", "what training takes of an image: a random part, resized, or the centre, moved by "
                                   "data.pad", choices=("resized", "pad"))
    scale: float = setting(0.08, "the least share of an image's area that a random part has", above=0, most=1,
                           only=_RESIZED)
    workers: int = setting(0, "processes that decode for training; 0: threads of this one", least=0, most=1024)


def check(config: Any) -> None:
    """Raises UserError for a crop that is larger than the image."""
    if config.data.resize < config.data.image_size:
        raise UserError(f"data.resize is {config.data.resize}: expected data.image_size, {config.data.image_size}, or "
                        "more")


class Store(Protocol):
    """Encoded images by number. It can be pickled, for processes that decode."""

    def read(self, number: int) -> bytes:
        """The file of an image. A UserError says what cannot be read."""

    def where(self, number: int) -> str:
        """What to call the image in a message."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """A split whose images are decoded as they are read; see `split.Split`.

    Stores hold class after class. Rows are in another order, always the same, so that the first of them are of all
    classes.

    Attributes:
        store: of n images.
        labels: (n,) int32, by row.
        order: (n,) int64, the number in `store` of each row.
        view: how an image is cut.
    """

    store: Store
    labels: np.ndarray
    order: np.ndarray
    view: Config

    decodes: ClassVar[bool] = True

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.view.image_size, self.view.image_size, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, row: int) -> str:
        """What to call an image in a message."""
        return self.store.where(self.order[row])

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """See `split.Split.take`: resized, and the centre cut out. An image that cannot be decoded is black, and a
        warning says so."""
        images = np.zeros((len(rows), *self.image_shape), np.uint8)

        def see(place):
            image = _cut(self.store.read(self.order[rows[place]]), functools.partial(centre, view=self.view))
            if image is None:
                _warn_once(f"{self.where(rows[place])} cannot be decoded and is shown black")
            else:
                images[place] = image

        labels = self.labels[rows]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(see, range(len(rows))))
        return {"image": images, "label": labels}

    def draw(self, row: int, generator: np.random.Generator) -> np.ndarray | None:
        """An image as training sees it.

        Args:
            row: in [0, n).
            generator: of the random part; what is drawn depends on it and on the image alone.
        Returns:
            (S, S, 3) uint8, or None if the image cannot be decoded.
        """
        how = functools.partial(centre, view=self.view) if self.view.crop == "pad" else functools.partial(
            part, view=self.view, generator=generator)
        return _cut(self.store.read(self.order[row]), how)


def opened(name: str, stores: dict[str, tuple[Store, np.ndarray]], class_names: tuple[str, ...], view: Config
           ) -> Dataset:
    """A data set of {split: (store, labels by its numbers)}.

    Raises:
        UserError: Pillow is missing; or see `Dataset`.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise UserError(f"{name} needs Pillow: run `pip install 'advmoe_jax[images]'`") from None
    found = {}
    for split, (store, labels) in stores.items():
        order = np.random.Generator(np.random.Philox(0)).permutation(len(labels))
        found[split] = Images(store, labels[order].astype(np.int32), order, view)
    return Dataset(name, *(found[split] for split in SPLITS), class_names)


def seen(whole: Dataset, fields: Any, usual: Config) -> Dataset:
    """A data set whose images are cut as `config.data` says.

    Raises:
        UserError: its images are in memory as they are, and the fields are not as usual.
    """
    view = Config(**{field.name: fields[field.name] for field in dataclasses.fields(Config)})
    if not whole.train.decodes:
        if view != usual:
            raise UserError(f"{whole.name} has images of one size, used as they are: expected data.image_size "
                            "and the like at their defaults")
        return whole
    return dataclasses.replace(whole, **{
        split: dataclasses.replace(whole.split(split), view=view) for split in SPLITS})


def box(width: int, height: int, least: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """A random part of an image, as torchvision's RandomResizedCrop draws it.

    Args:
        width: of the image.
        height: of the image.
        least: the least share of the area, in (0, 1].
        generator: draws it.
    Returns:
        Left, top, width and height.
    """
    for _ in range(_TRIES):
        area = width * height * generator.uniform(least, 1)
        ratio = np.exp(generator.uniform(*np.log(_RATIO)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1)), w, h
    ratio = np.clip(width / height, *_RATIO)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def part(image: Any, view: Config, generator: np.random.Generator) -> np.ndarray:
    """A random part of a Pillow image, resized: (S, S, 3) uint8.

    A JPEG file is decoded at a half, a quarter or an eighth where the part is large enough then.
    """
    size, full = view.image_size, image.size
    left, top, width, height = box(*full, view.scale, generator)
    image.draft(None, (-(-full[0] * size // width), -(-full[1] * size // height)))
    x, y = (now / before for now, before in zip(image.size, full))
    return _resized(image, (size, size), (left * x, top * y, (left + width) * x, (top + height) * y))


def centre(image: Any, view: Config) -> np.ndarray:
    """The centre of a Pillow image whose shorter side is `view.resize` then: (S, S, 3) uint8."""
    width, height = (view.resize * side // min(image.size) for side in image.size)
    left, top = (round((side - view.image_size) / 2) for side in (width, height))
    return _resized(image, (width, height))[top:top + view.image_size, left:left + view.image_size]


def _resized(image, size, box=None):
    """(height, width, 3) uint8, whatever the colours of the file are."""
    from PIL import Image
    image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))


def _cut(data, how):
    """What `how` takes of an encoded image, or None if it cannot be decoded."""
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data)) as image:
            return how(image)
    except Exception:  # foreign bytes fail in any way: there is no common base class
        return None


_warn_once = functools.cache(console.warn)
