"""Multiply-accumulates per image, counted layer by layer: convolutions and linear layers, without BatchNorm."""

from collections.abc import Mapping
from typing import Any

from advmoe_jax.core import masked, tree


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
    shapes = {name: leaf.shape for name, leaf in tree.named_leaves(network.shapes["params"]).items()}
    kept = masked.shares(shapes, masks)

    def counted(spec):
        return spec.macs * kept.get(f"{spec.path}/kernel", 1)

    backbone = [spec for spec in network.layers if not spec.path.startswith("router/")]
    pathway = int(sum(map(counted, backbone)))
    total = int(sum(map(counted, network.layers)))
    every = network.num_experts if network.module.dispatch.kind == "all" else 1
    return {"pathway": pathway, "router": total - pathway, "total": total,
            "executed": sum(min(spec.stored_macs, every * spec.macs) for spec in network.layers),
            "params": masked.kept(shapes, masks)}
