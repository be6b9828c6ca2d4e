"""Normalisation of images inside a model: (x - mean) / std by channel, so that images are in [0, 1] everywhere else.

B batch, H W height and width, C channels.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core.errors import UserError, shown

IMAGENET = "0.485 0.456 0.406", "0.229 0.224 0.225"
"""(mean, std) of ImageNet's training images, as torchvision's models take them."""
CIFAR10 = "0.4914 0.4822 0.4465", "0.2023 0.1994 0.2010"
"""(mean, std) of CIFAR-10's training images, as many CIFAR models take them."""

NAMES = "model.mean", "model.std"
_LEAST = float(np.finfo(np.float32).tiny)  # what is below may become 0


def means(text: str, name: str) -> tuple[float, ...]:
    """The numbers of "0.485 0.456 0.406", with spaces or commas between them; () of "".

    Args:
        text: what a field holds.
        name: of the field.
    Raises:
        UserError: something is no number, or not finite in float32.
    """
    numbers = tuple(_number(word) for word in text.replace(",", " ").split())
    if None in numbers or (text and not numbers):
        raise UserError(f"{name} is {shown(text)}: expected a finite number for each channel, such as "
                        f"{IMAGENET[0]!r}, or nothing")
    return numbers


def deviations(text: str, name: str) -> tuple[float, ...]:
    """As `means`; each number is above 0."""
    numbers = means(text, name)
    if any(number < _LEAST for number in numbers):
        raise UserError(f"{name} is {shown(text)}: expected numbers above 0")
    return numbers


def check(mean: str, std: str, names: tuple[str, str] = NAMES) -> None:
    """Raises UserError for one without the other, or another number of channels; `names` are those of the two."""
    texts, found = (mean, std), (means(mean, names[0]), deviations(std, names[1]))
    for given, missing in ((0, 1), (1, 0)):
        if found[given] and not found[missing]:
            raise UserError(f"{names[given]} is {shown(texts[given])} and {names[missing]} is empty: expected both or "
                            "neither")
    if len(found[0]) != len(found[1]):
        raise UserError(f"{names[0]} has {len(found[0])} numbers and {names[1]} {len(found[1])}: expected one for each "
                        "channel in both")


def read(mean: str, std: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as numbers, for images of so many channels; ((), ()) of empty texts. Errors as `check`."""
    check(mean, std)
    numbers = means(mean, NAMES[0])
    if numbers and len(numbers) != channels:
        raise UserError(f"{' and '.join(NAMES)} have {len(numbers)} numbers and images {channels} channels: "
                        "expected one for each channel")
    return numbers, deviations(std, NAMES[1])


def apply(x: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(B, H, W, C) in [0, 1] -> (x - mean) / std; x where there is no mean."""
    if not mean:
        return x
    mean, std = (jnp.asarray(numbers, x.dtype)[None, None, None] for numbers in (mean, std))
    return (x - mean) / std


def _number(word: str) -> float | None:
    """A number that is finite in float32, else None."""
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) <= float(np.finfo(np.float32).max) else None
