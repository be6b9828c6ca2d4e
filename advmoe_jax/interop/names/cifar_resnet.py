"""PyTorch names of models.cifar_resnet: those of akamaster/pytorch_resnet_cifar10."""

from advmoe_jax.core.layer_spec import LayerSpec


def rules(layers: tuple[LayerSpec, ...]) -> dict[str, str]:
    """{regular expression for our path in the backbone: the PyTorch name}."""
    return {
        r"conv1": r"conv1",
        r"layer(\d+)_(\d+)/(conv\d)": r"layer\1.\2.\3",
        r"linear": r"linear",
    }
