"""The architectures of PyTorch checkpoints by name, as fields of our models, read from tensors where they say it."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.interop.torch_files import Checkpoint
from advmoe_jax.interop.torch_import import missing
from advmoe_jax.models import normalisation
from advmoe_jax.models.layers import scaled_width

_WIDTH = 64  # of the released AdvMoE code's ResNets, which say their scale and not their width


@dataclasses.dataclass(frozen=True)
class Found:
    """What a checkpoint of a known architecture is.

    Attributes:
        fields: of `config.model`.
        num_classes: K.
        data: what it was trained on, by the architecture.
        image_size: pixels of a side of those images.
        mean, std: texts, how images are normalised where the file does not say it; "" for not.
    """

    fields: dict[str, Any]
    num_classes: int
    data: str
    image_size: int
    mean: str = ""
    std: str = ""


def names() -> tuple[str, ...]:
    """Of all architectures."""
    return tuple(_ARCHS)


def read(arch: str, checkpoint: Checkpoint, shortcut_pad: str = "both") -> Found:
    """What a checkpoint is.

    Args:
        arch: one of `names()`.
        checkpoint: its tensors.
        shortcut_pad: of CIFAR ResNets, one of models.cifar_resnet.PADS.
    Raises:
        UserError: a tensor that says the width, the classes or the experts is missing or of another shape.
    """
    return _ARCHS[arch](arch, checkpoint, shortcut_pad)


def has_shortcut_pad(arch: str) -> bool:
    """Whether `shortcut_pad` has an effect."""
    return _ARCHS[arch] is _cifar_resnet


def _depth(arch: str) -> int:
    return int(re.search(r"\d+$", arch)[0])


def _dense(name: str, width: int, arch: str, **fields: Any) -> dict[str, Any]:
    return dict(name=name, num_experts=1, model_scale=1.0, width=width, depth=_depth(arch)) | fields


def _cifar_resnet(arch: str, checkpoint: Checkpoint, shortcut_pad: str) -> Found:
    """akamaster's with ImageNet's normalisation, and those of SR-GKP with CIFAR-10's, which append empty channels."""
    shapes = _Shapes(checkpoint.weights)
    fields = _dense("cifar_resnet", shapes("conv1.weight", 4)[0], arch, shortcut_pad=shortcut_pad)
    mean, std = normalisation.IMAGENET if shortcut_pad == "both" else normalisation.CIFAR10
    return Found(fields, shapes("linear.weight", 2)[0], "cifar10", 32, mean, std)


def _vgg(arch: str, checkpoint: Checkpoint, shortcut_pad: str) -> Found:
    """kuangliu's."""
    shapes = _Shapes(checkpoint.weights)
    return Found(_dense("vgg", shapes("features.0.weight", 4)[0], arch), shapes("classifier.weight", 2)[0], "cifar10",
                 32, *normalisation.CIFAR10)


def _torchvision(arch: str, checkpoint: Checkpoint, shortcut_pad: str) -> Found:
    shapes = _Shapes(checkpoint.weights)
    return Found(_dense("resnet", shapes("conv1.weight", 4)[0], arch, stem="imagenet"), shapes("fc.weight", 2)[0],
                 "imagenet", 224, *normalisation.IMAGENET)


def _advmoe(arch: str, checkpoint: Checkpoint, shortcut_pad: str) -> Found:
    """The released AdvMoE code's: a mixture if there is a router, of as many experts as that has outputs."""
    router = {re.sub(r"^(.*\.)?router\.", "", name): value for name, value in checkpoint.weights.items()
              if re.match(r"(.*\.)?router\.", name)} or checkpoint.router
    shapes, of_router = _Shapes(checkpoint.weights), _Shapes(router, "router.")
    stem, _, size, _ = shapes("conv1.weight", 4)
    cifar, head = (True, "linear.weight") if size == 3 else (False, "fc.weight")
    experts = of_router("fc.weight", 2)[0] if router else 1
    widest = shapes(head, 2)[1]
    width = stem if router and cifar else max(_WIDTH, -(-widest // 8))
    fields = dict(name="resnet", depth=_depth(arch), stem="cifar" if cifar else "imagenet", num_experts=experts,
                  width=width, model_scale=_scale(widest, width))
    if router:
        fields |= dict(experts="disjoint", routing="global", router_width=of_router("conv1.weight", 4)[0])
    return Found(fields, shapes(head, 2)[0], "cifar10" if cifar else "imagenet", 32 if cifar else 224)


def _scale(widest: int, width: int) -> float:
    """An r by which the last stage, of 8 * width channels, has so many: one or two digits if they do."""
    exact = widest / (8 * width)
    tried = (math.ceil(exact * 10) / 10, math.ceil(exact * 100) / 100, exact, math.nextafter(exact, 1))
    return next((r for r in tried if 0 < r <= 1 and scaled_width(8 * width, r) == widest), 1.0)


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """Shapes of tensors by name; `prefix` stands before the names in messages."""

    tensors: Mapping[str, np.ndarray]
    prefix: str = ""

    def __call__(self, name: str, ndim: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise missing(self.prefix + name, self.tensors, self.tensors)
        shape = self.tensors[name].shape
        if len(shape) != ndim or not all(shape):
            raise UserError(f"tensor {self.prefix}{name} of the state dict is {shape}: expected {ndim} axes, none "
                            "empty")
        return shape


_ARCHS: dict[str, Callable[[str, Checkpoint, str], Found]] = {
    **{f"resnet{depth}": _cifar_resnet for depth in (20, 32, 44, 56, 110)},
    **{f"vgg{depth}": _vgg for depth in (11, 13, 16, 19)},
    **{f"resnet{depth}": _torchvision for depth in (18, 34, 50, 101, 152)},
    "advmoe_resnet18": _advmoe}
