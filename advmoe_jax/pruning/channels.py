"""Channels that can be removed: which layers write and read them, how many go, and the masks that remove them.

w channels of a group, O stored output channels, I input channels.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np

from advmoe_jax.core import shares
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import LayerSpec

_STEPS = 2**14  # as finely are the shares divided that are tried for a budget


@dataclasses.dataclass(frozen=True)
class Channels:
    """Channels that go together, because layers add what they write (Fang et al., DepGraph, CVPR 2023).

    Attributes:
        writers: layers whose outputs they are; several where outputs are added.
        readers: layers whose inputs they are.
    """

    writers: tuple[LayerSpec, ...]
    readers: tuple[LayerSpec, ...]

    @property
    def name(self) -> str:
        return self.writers[0].path

    @property
    def width(self) -> int:
        return self.writers[0].width


def removable(layers: tuple[LayerSpec, ...], coupled: bool = False) -> tuple[Channels, ...]:
    """The groups of channels that can be removed whole, in the order of the layers.

    Channels stay that reach the output or an operation whose channels are others: those that are added to the image or
    to fewer channels, as in shortcuts without parameters, joined by concatenation, flattened with positions, shared
    by the overlapping windows of experts, or gathered by groups that choose their own.

    Args:
        layers: of a network.
        coupled: also those that several layers write, else only those of one.
    """
    root, found = roots(layers, layers), []
    for first in layers:
        writers = tuple(spec for spec in layers if root[spec.path] == root[first.path])
        if writers[0] is first:
            names = {spec.path for spec in writers}
            group = Channels(writers, tuple(spec for spec in layers if names & set(spec.inputs)))
            if _can_go(group) and (coupled or len(writers) == 1):
                found.append(group)
    return tuple(found)


def roots(layers: tuple[LayerSpec, ...], readers: Iterable[LayerSpec]) -> dict[str, str]:
    """{path of a layer: path that it shares with those whose outputs any of the readers joins with its own}."""
    root = {spec.path: spec.path for spec in layers}

    def find(path):
        while root[path] != path:
            path = root[path]
        return path

    for spec in readers:
        for path in spec.inputs[1:]:
            root[find(path)] = find(spec.inputs[0])
    return {path: find(path) for path in root}


def _can_go(group: Channels) -> bool:
    read = {path for spec in group.readers for path in spec.inputs}
    return (all(len(spec.kernel) in (2, 4) for spec in (*group.writers, *group.readers))
            and all(spec.path in read and spec.width == group.width and spec.kernel[-1] % group.width == 0
                    and spec.groups == 1 for spec in group.writers)
            and all(_inputs(spec) == group.width and spec.join == ("" if len(spec.inputs) == 1 else "add")
                    and not spec.is_gathered for spec in group.readers))


def _inputs(spec: LayerSpec) -> int:
    return spec.kernel[-2] * spec.groups


def fit(layers: tuple[LayerSpec, ...], groups: tuple[Channels, ...], most: int | Fraction,
        weights: Mapping[str, float | Fraction] | None = None) -> dict[str, int]:
    """How many channels each group keeps, so that the network needs at most so many multiply-accumulates.

    Of a group with weight v the share min(t * v, all but one channel) is removed, with the least t that suffices.

    Args:
        layers: of the network.
        groups: that may lose channels.
        most: multiply-accumulates that the network may need.
        weights: {name of a group: v}; 1 unless given.
    Raises:
        UserError: not even one channel of each is few enough.
    """
    weights = weights or {}

    def kept(step):
        shares_removed = {group.name: Fraction(step, _STEPS) * Fraction(weights.get(group.name, 1)).limit_denominator(
            10**6) for group in groups}
        return {group.name: max(1, group.width - math.floor(shares_removed[group.name] * group.width))
                for group in groups}

    largest = _STEPS * math.ceil(1 / min((v for v in weights.values() if v > 0), default=1))
    if not groups or macs(layers, groups, kept(largest)) > most:
        raise UserError(f"no channels that can go leave at most {int(most):,} multiply-accumulates of "
                        f"{sum(spec.macs for spec in layers):,}: expected a lower rate, or a method that removes "
                        "kernels or weights")
    low, high = 0, largest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if macs(layers, groups, kept(middle)) <= most else (middle + 1, high)
    return kept(low)


def macs(layers: tuple[LayerSpec, ...], groups: tuple[Channels, ...], kept: Mapping[str, int]) -> Fraction:
    """Multiply-accumulates of a network whose groups keep so many channels."""
    written, read = {}, {}
    for group in groups:
        share = Fraction(kept[group.name], group.width)
        written |= dict.fromkeys((spec.path for spec in group.writers), share)
        read |= dict.fromkeys((spec.path for spec in group.readers), share)
    return sum((spec.macs * written.get(spec.path, 1) * read.get(spec.path, 1) for spec in layers), Fraction(0))


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """(w,) bool, the `count` largest; of equal ones the first."""
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count]] = True
    return kept


def removing(groups: tuple[Channels, ...], kept: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{path of a layer: bool mask of its kernel}, of the kept channels of each group, {name: (w,) bool}."""
    found: dict[str, np.ndarray] = {}

    def add(spec, mask):
        mask = mask.reshape((1,) * (len(spec.kernel) - mask.ndim) + mask.shape)
        found[spec.path] = found[spec.path] & mask if spec.path in found else mask

    for group in groups:
        of = np.asarray(kept[group.name], bool)
        for spec in group.writers:
            add(spec, np.tile(of, spec.kernel[-1] // group.width))
        for spec in group.readers:
            if spec.groups == 1:
                add(spec, of[:, None])
            else:  # filter o of a grouped convolution reads the I / groups channels of its group
                add(spec, np.repeat(of.reshape(spec.groups, -1).T, spec.kernel[-1] // spec.groups, 1))
    return found


def share_of(rate: str | float | Fraction) -> Fraction:
    """Reads a rate, the share that is removed. Raises UserError unless it is above 0 and below 1."""
    share = shares.share(rate, "rate")
    if not 0 < share < 1:
        raise UserError(f"rate is {rate!r}: expected more than 0 and less than 1")
    return share
