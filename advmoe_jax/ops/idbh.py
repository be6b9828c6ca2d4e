"""IDBH, augmentation of improved diversity and balanced hardness, for adversarial training; Li & Spratling, ICLR 2023.

Each image is mirrored or not; cut and moved (CropShift); changed in colour or shape by one of eight operations; and
perhaps loses a rectangle (random erasing; Zhong et al., AAAI 2020). Strengths are those of the authors' code, by the
names that it has: "weak" and "strong" are for CIFAR-10, "svhn" for SVHN.

x images (B, H, W, C) in [0, 1], of 1 or 3 channels; a function takes one key, and image b uses draw b.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from advmoe_jax.ops import distort, warp
from advmoe_jax.ops.augment import interval

_FACTORS = {"saturation": (0.1, 1.9), "brightness": (0.5, 1.9), "contrast": (0.5, 1.9), "sharpness": (0.1, 1.9)}
OPERATIONS = (*_FACTORS, "autocontrast", "equalize", "shear", "turn")
_RATIO, _TRIES = (0.3, 3.3), 10  # of height to width of what is erased
_LEAST_ERASED = 0.02


@dataclasses.dataclass(frozen=True)
class Policy:
    """How strong it is.

    Attributes:
        lines: rows and columns together that CropShift removes of an image of 32 pixels, at most; of one of another
            size, in proportion.
        chances: of each of OPERATIONS.
        shear: the least and the largest angle, radians.
        degrees: the largest angle by which images turn; the least is 1.
        erased: chance that a rectangle is.
        largest: share of an image's area that the rectangle has, at most.
    """

    lines: int
    chances: tuple[float, ...]
    shear: tuple[float, float]
    degrees: int
    erased: float
    largest: float = 0.33


_COLOUR = dict(lines=10, chances=(0.125,) * 8, shear=(0.05, 0.15), degrees=10)
POLICIES = {
    "weak": Policy(**_COLOUR, erased=0.5),
    "strong": Policy(**_COLOUR, erased=1.0),
    "svhn": Policy(lines=8, chances=(0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.3, 0.3), shear=(0.05, 0.35), degrees=30,
                   erased=1.0, largest=0.5)}


def augment(key: jax.Array, x: jax.Array, policy: Policy) -> jax.Array:
    """All but mirroring."""
    shift, change, erase = jax.random.split(key, 3)
    x = crop_shift(shift, x, round(policy.lines * min(x.shape[1:3]) / 32))
    return random_erasing(erase, colour_shape(change, x, policy), policy.erased, policy.largest)


def crop_shift(key: jax.Array, x: jax.Array, lines: int) -> jax.Array:
    """A rectangle of each image, put down anywhere; around it is 0.

    Args:
        key, x: as above.
        lines: rows and columns that the rectangle lacks: 0 to so many together, and 0 to all of these are columns.
    """
    amount, split, *places = jax.random.split(key, 6)
    amount = jax.random.randint(amount, x.shape[:1], 0, lines + 1)
    columns = jax.random.randint(split, x.shape[:1], 0, amount + 1)
    rows = amount - columns
    top, down, left, right = (jax.random.randint(key, x.shape[:1], 0, gone + 1)
                              for key, gone in zip(places, (rows, rows, columns, columns)))
    row, is_row = _moved(x.shape[1], rows, top, down)
    column, is_column = _moved(x.shape[2], columns, left, right)
    found = x[jnp.arange(len(x))[:, None, None], row[:, :, None], column[:, None, :]]
    return jnp.where((is_row[:, :, None] & is_column[:, None, :])[..., None], found, 0)


def _moved(size, gone, first, to):
    """(B, size): which line comes where, and whether one does, when those from `first` on are put down at `to`."""
    place = jnp.arange(size)[None] - to[:, None]
    return jnp.clip(place + first[:, None], 0, size - 1), (place >= 0) & (place < size - gone[:, None])


def colour_shape(key: jax.Array, x: jax.Array, policy: Policy) -> jax.Array:
    """Each image changed by one of OPERATIONS, by a strength of its own."""
    which, strength, sign, axis = jax.random.split(key, 4)
    which = jax.random.choice(which, len(OPERATIONS), x.shape[:1], p=jnp.asarray(policy.chances))
    share = jax.random.uniform(strength, x.shape[:1], x.dtype)
    sign = jnp.where(jax.random.bernoulli(sign, shape=x.shape[:1]), 1, -1)
    across = jax.random.bernoulli(axis, shape=x.shape[:1])

    def between(low, high):
        return low + (high - low) * share

    slope = sign * jnp.tan(between(*policy.shear))
    slopes = jnp.stack([jnp.where(across, 0, slope), jnp.where(across, slope, 0)], 1)
    degrees = sign * jnp.floor(between(1, policy.degrees + 1))
    changed = (*(getattr(distort, name)(x, between(*bounds)) for name, bounds in _FACTORS.items()),
               distort.autocontrast(x), distort.equalize(x), warp.shear(x, slopes),
               warp.warp(x, degrees, jnp.zeros((len(x), 2), x.dtype), bilinear=False))
    return jax.lax.select_n(jnp.broadcast_to(which[:, None, None, None], x.shape), *changed)


def random_erasing(key: jax.Array, x: jax.Array, chance: float, largest: float) -> jax.Array:
    """Some images with a rectangle of zeros, whose height is 0.3 to 3.3 of its width.

    Ten are drawn of each image, of 2 % of its area to `largest`; the first that is lower and narrower than the image is
    taken, and if there is none, none.

    Args:
        key, x: as above.
        chance: share of the images.
        largest: share of the area.
    """
    is_erased, area, ratio, *places = jax.random.split(key, 5)
    shape, sizes = (len(x), _TRIES), x.shape[1:3]
    area = math.prod(sizes) * jax.random.uniform(area, shape, minval=_LEAST_ERASED, maxval=largest)
    ratio = jnp.exp(jax.random.uniform(ratio, shape, minval=math.log(_RATIO[0]), maxval=math.log(_RATIO[1])))
    both = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (both[0] < sizes[0]) & (both[1] < sizes[1])
    first = jnp.argmax(fits, 1)[:, None]
    spans = []
    for key, of, size in zip(places, both, sizes):
        length = jnp.take_along_axis(of, first, 1).astype(jnp.int32)
        start = jax.random.randint(key, length.shape, 0, jnp.maximum(size - length, 0) + 1)
        spans.append(interval(size, start, length))
    is_erased = jax.random.bernoulli(is_erased, chance, x.shape[:1]) & jnp.any(fits, 1)
    gone = is_erased[:, None, None] & spans[0][:, :, None] & spans[1][:, None, :]
    return jnp.where(gone[..., None], 0, x)
