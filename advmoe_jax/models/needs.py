"""What a backbone needs of a config and of images, so that what it cannot take is refused before it is built.

H height, W width, C channels.
"""

import dataclasses
from collections.abc import Mapping

from advmoe_jax.core import find
from advmoe_jax.core.errors import UserError
from advmoe_jax.models.layers import scaled_width


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the function `needs(cfg)` of a backbone's module gives, of the fields of `config.model`.

    Attributes:
        channels: {what: C} of the narrowest layers of the dense network, of which `model_scale` must leave one.
        pixels: of a side of an image, at least.
        because: the field that makes it so many, "model.stem=imagenet".
        instead: what takes smaller images, "model.stem=cifar".
        patch: `model.patch`, of which both sides of an image are multiples.
    """

    channels: Mapping[str, int]
    pixels: int = 1
    because: str = ""
    instead: str = ""
    patch: int = 1


def of(cfg) -> Needs:
    """Those of the backbone that `config.model` names, itself or as that of its members or its base."""
    name = cfg.get("member") or cfg.get("base") or cfg.name
    module = find.module("models", name, defines=("backbone", "model"), kind="model.name")
    return module.needs(cfg) if hasattr(module, "needs") else Needs({})


def check_channels(cfg) -> None:
    """Raises UserError for a `config.model` of which a layer is left without channels."""
    for what, channels in of(cfg).channels.items():
        scaled_width(channels, cfg.model_scale, what)


def check_pixels(cfg, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError for images (H, W, C) that are too small for what `config.model` describes, or do not divide into
    its patches."""
    needs, (height, width, _) = of(cfg), image_shape
    if min(height, width) < needs.pixels:
        raise UserError(f"images of {height}x{width} pixels are too small for {needs.because}, which takes "
                        f"{needs.pixels}x{needs.pixels} or more: expected larger images, or {needs.instead}")
    if height % needs.patch or width % needs.patch:
        near = max(size for size in range(1, min(needs.patch, height, width) + 1)
                   if height % size == 0 and width % size == 0)
        raise UserError(f"model.patch is {needs.patch}, which does not divide images of {height}x{width} pixels: "
                        f"expected a divisor, such as {near}")
