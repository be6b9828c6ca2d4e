"""Multiply-accumulates per image, counted layer by layer: convolutions and linear layers, without BatchNorm."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from advmoe_jax.core import tree


def count(network, masks: Mapping[str, Any] | None = None) -> dict[str, int]:
    """MACs and parameters of a network.

    Args:
        network: a models.network.Network.
        masks: {group: tree} as `State.masks`; None: dense. What is masked is neither computed nor counted, of a routed
            layer the mean over its stored channels.
    Returns:
        Of one image: "pathway", the backbone with one expert a layer; "router"; "total", their sum; "executed", what is
        computed: with `model.dispatch` "all" every expert and the router, else as "total", padding left out. Of the
        network: "params".
    """
    shapes = tree.named_leaves(network.shapes["params"])
    kept = {name: Fraction(int(np.count_nonzero(np.broadcast_to(mask, shapes[name].shape))), shapes[name].size)
            for name, mask in tree.named_leaves(masks or {}).items()}

    def total(specs, of):
        return int(sum(of(spec) * kept.get(f"{spec.path}/kernel", 1) for spec in specs))

    backbone = [spec for spec in network.layers if not spec.path.startswith("router/")]
    router = total((spec for spec in network.layers if spec.path.startswith("router/")), lambda spec: spec.macs)
    pathway = total(backbone, lambda spec: spec.macs)
    stored = total(backbone, lambda spec: min(spec.stored_macs, network.num_experts * spec.macs))
    computes_all = network.module.dispatch.kind == "all"
    return {"pathway": pathway, "router": router, "total": pathway + router,
            "executed": (stored if computes_all else pathway) + router,
            "params": int(sum(leaf.size * kept.get(name, 1) for name, leaf in shapes.items()))}
