"""Multiply-accumulates per image, counted layer by layer: convolutions and linear layers, without BatchNorm."""

from advmoe_jax.models.network import Network


def count(network: Network) -> dict[str, int]:
    """MACs of one image.

    Returns:
        "pathway": the backbone with one expert a layer; "router"; "total", their sum; "executed", what is computed:
        with `model.dispatch` "all" every expert and the router, else as "total", fillers left out.
    """
    backbone = [spec for spec in network.layers if spec.path.startswith("backbone/")]
    router = sum(spec.macs for spec in network.layers if spec.path.startswith("router/"))
    pathway = sum(spec.macs for spec in backbone)
    stored = sum(min(spec.stored_macs, network.num_experts * spec.macs) for spec in backbone)
    return {"pathway": pathway, "router": router, "total": pathway + router,
            "executed": (stored if network.module.dispatch.kind == "all" else pathway) + router}
