"""Channels that go whole wherever layers write and read them: those that are added are chosen together.

What is left has the shape of a narrower dense network. w channels of a stream, I input channels.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp

from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.pruning import channels


def streams(layers: tuple[LayerSpec, ...], paths: Collection[str]) -> dict[str, tuple[str, ...]]:
    """{name: paths of the convolutions that write it}, channels that are selected together because layers add them.

    Unlike `channels.removable` it also has what is joined by concatenation or flattened. A stream stays whole if one of
    its writers does, or if they differ in width.

    Args:
        layers: of a network.
        paths: of the layers that may lose channels.
    """
    root = channels.roots(layers, (spec for spec in layers if spec.join == "add"))
    found: dict[str, list[LayerSpec]] = {}
    for spec in layers:
        found.setdefault(root[spec.path], []).append(spec)
    return {name: tuple(spec.path for spec in writers) for name, writers in found.items()
            if all(spec.path in paths and len(spec.kernel) == 4 and not spec.routed for spec in writers)
            and len({spec.width for spec in writers}) == 1}


def spanning(layers: tuple[LayerSpec, ...], kept: Mapping[str, Any]) -> dict[str, Any]:
    """{path of a layer: mask of its kernel} without the channels that go: neither the filters that write them nor the
    weights that read them.

    Weights stay that read a channel at several positions, in a grouped convolution, or beside the image.

    Args:
        layers: of a network.
        kept: {path of a layer: (w,) mask of the channels that it writes, which may be traced}, alike for layers whose
            outputs are added.
    """
    widths = {spec.path: spec.width for spec in layers}

    def read(spec):
        """(I, 1), or None where nothing of what it reads goes, or nothing of its own weights with it."""
        if not any(path in kept for path in spec.inputs) or spec.groups > 1 or spec.is_gathered:
            return None
        parts = [kept.get(path, jnp.ones(widths[path])) for path in spec.inputs]
        if spec.join == "concat":
            parts = [jnp.concatenate(parts)]
        is_whole = len(parts[0]) == spec.kernel[-2] and (spec.join != "add" or len(parts) > 1)
        return parts[0][:, None] if is_whole else None

    found = {}
    for spec in layers:
        masks = [kept[spec.path][None]] if spec.path in kept else []
        masks += [mask for mask in (read(spec),) if mask is not None]
        if masks and len(spec.kernel) in (2, 4):
            mask = math.prod(masks[1:], start=masks[0])
            found[spec.path] = mask.reshape((1,) * (len(spec.kernel) - 2) + mask.shape)
    return found
