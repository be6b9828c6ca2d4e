"""PyTorch names of models.vgg: those of kuangliu/pytorch-cifar. A mixture has none."""

from advmoe_jax.core.layer_spec import LayerSpec


def rules(layers: tuple[LayerSpec, ...]) -> dict[str, str]:
    """{regular expression for our path in the backbone: the PyTorch name}, by the layers of the backbone."""
    if any(spec.routed for spec in layers):
        return {}
    return {r"features_(\d+)": r"features.\1", r"classifier": r"classifier"}
