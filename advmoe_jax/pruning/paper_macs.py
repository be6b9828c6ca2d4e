"""The counter of the pruning papers: "MACs" that are not multiply-accumulates alone, to compare with their tables.

As DPF has it, and SR-GKP (NeurIPS 2023) and the methods it is compared to: weights that are not zero times the
positions of the output; biases; two operations for each input of a BatchNorm; one for each output of a ReLU; the
window of a pool for each of its outputs. What is a function in PyTorch and no module is not seen, so that the same
network counts differently by how it was written: the caller says which ReLUs and pools are seen. A BatchNorm is seen
where it reads one layer's output as it is, and not where it reads what several layers give. Our own counter is
`models.macs`.

B batch, H W height and width, C channels, O output channels, k size of a window.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from advmoe_jax.core import masked
from advmoe_jax.core.errors import UserError, unknown_name
from advmoe_jax.core.layer_spec import LayerSpec


@dataclasses.dataclass(frozen=True)
class Pool:
    """A pool that is a module.

    Attributes:
        window: k * k.
        outputs: C * H * W.
    """

    window: int
    outputs: int


def count(layers: Sequence[LayerSpec], sizes: Mapping[str, tuple[int, ...]], masks: Mapping[str, Any] | None = None, *,
          relus: Collection[str] = (), pools: Sequence[Pool] = ()) -> dict[str, int]:
    """"macs" of one image and "params", as the papers count them.

    Args:
        layers: of the network.
        sizes: {"backbone/conv1/kernel": (3, 3, 3, 16)} of all parameters.
        masks: {group: tree} as `State.masks`, which broadcast to the parameters; None: dense.
        relus: paths of the layers behind which a ReLU is a module: behind its norm, or behind the sum of its output
            with another of the same shape.
        pools: those that are modules.
    Raises:
        UserError: a path in `relus` is of no layer, or a layer has no size.
    """
    paths, kept = {spec.path for spec in layers}, masked.shares(sizes, masks)
    for path in relus:
        if path not in paths:
            raise unknown_name("layer", path, paths)
    total = sum(pool.window * pool.outputs for pool in pools)
    for spec in layers:
        if f"{spec.path}/kernel" not in sizes:
            raise UserError(f"no size of {spec.path}/kernel: expected those of all parameters")
        outputs = spec.width * math.prod(spec.out_size)
        total += spec.macs * kept.get(f"{spec.path}/kernel", 1)
        if f"{spec.path}/bias" in sizes:
            total += outputs * kept.get(f"{spec.path}/bias", 1)
        total += outputs * (2 * (spec.norm is not None) + (spec.path in relus))
    return {"macs": int(total), "params": masked.kept(sizes, masks)}


def last_pool(layers: Sequence[LayerSpec]) -> Pool:
    """The average pool over what is left of the image, before the linear layer that comes last."""
    linear = layers[-1]
    before = next(spec for spec in layers if spec.path == linear.inputs[-1])
    return Pool(math.prod(before.out_size), linear.kernel[0])


def shortcut_pools(layers: Sequence[LayerSpec]) -> tuple[Pool, ...]:
    """Those of shortcuts without parameters, which take every second pixel by a pool with a window of one: one for
    each 3x3 convolution with a stride, of as many channels as that reads."""
    widths = {spec.path: spec.width for spec in layers}
    return tuple(Pool(1, max(widths[path] for path in spec.inputs) * math.prod(spec.out_size)) for spec in layers
                 if spec.stride > 1 and spec.kernel[0] == 3)
