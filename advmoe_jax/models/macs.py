"""Multiply-accumulates per image, counted layer by layer: convolutions, linear layers, and the two matrix products of
attention, queries times keys and the softmax times values, in which each token attends to all. Norms, activations,
softmax, biases and the factors of experts are not.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from advmoe_jax.core import masked, tree


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one layer costs, of which an image is computed once.

    Attributes:
        path: as of its LayerSpec.
        macs: multiply-accumulates that one image needs, of a routed layer by one expert; what is masked needs none, of
            a routed layer in the mean over its stored channels. With `LayerSpec.products`, which masks do not lessen.
        executed: what is computed, zeros of masks included.
        params: of its kernel and bias that are kept.
    """

    path: str
    macs: Fraction | int
    executed: int
    params: int


def by_layer(network, masks: Mapping[str, Any] | None = None) -> tuple[LayerCost, ...]:
    """What each layer of a network costs, in the order of `Network.layers`. Arguments as `count`."""
    shapes = _shapes(network)
    kept = masked.shares(shapes, masks)
    every = network.num_experts if network.module.dispatch.kind == "all" else 1

    def params(path):
        own = [name for name in (f"{path}/kernel", f"{path}/bias") if name in shapes]
        return int(sum(math.prod(shapes[name]) * kept.get(name, 1) for name in own))

    return tuple(LayerCost(spec.path, spec.macs * kept.get(f"{spec.path}/kernel", 1) + spec.products,
                           min(spec.stored_macs, every * spec.macs) + spec.products, params(spec.path))
                 for spec in network.layers)


def count(network, masks: Mapping[str, Any] | None = None) -> dict[str, int]:
    """MACs and parameters of a network.

    Args:
        network: a models.network.Network.
        masks: {group: tree} as `State.masks`; None: dense. What is masked is not counted but as "executed"; of a
            routed layer the mean over its stored channels.
    Returns:
        Of one image: "pathway", the backbone with one expert a layer; "router"; "total", their sum; "executed", what is
        computed, zeros of masks included: with `model.dispatch` "all" every expert and the router, else one expert a
        layer, padding left out. Of the network: "params".
    """
    costs = by_layer(network, masks)
    pathway = int(sum(cost.macs for cost in costs if not cost.path.startswith("router/")))
    total = int(sum(cost.macs for cost in costs))
    return {"pathway": pathway, "router": total - pathway, "total": total,
            "executed": sum(cost.executed for cost in costs), "params": masked.kept(_shapes(network), masks)}


def _shapes(network) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in tree.named_leaves(network.shapes["params"]).items()}
