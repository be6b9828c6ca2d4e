"""PyTorch names of the router of model.routing=global: those of the router of the released AdvMoE code."""

from advmoe_jax.core.layer_spec import LayerSpec

_GLOBAL = {
    r"conv1": r"conv1",
    r"layer(\d)_(\d)_(conv\d)": r"layer\1.\2.\3",
    r"fc": r"fc",
}


def rules(layers: tuple[LayerSpec, ...]) -> dict[str, str]:
    """{regular expression for our path in the router: the PyTorch name}; none for the layers of another router."""
    return _GLOBAL if any(spec.path == "router/fc" for spec in layers) else {}
