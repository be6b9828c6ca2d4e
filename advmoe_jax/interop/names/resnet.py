"""PyTorch names of models.resnet: with the CIFAR stem those of the released AdvMoE code and of kuangliu/pytorch-cifar,
else those of torchvision."""

from advmoe_jax.core.layer_spec import LayerSpec

_BOTH = {
    r"conv1": r"conv1",
    r"layer(\d+)_(\d+)/(conv\d)": r"layer\1.\2.\3",
}
_CIFAR = _BOTH | {
    r"layer(\d+)_(\d+)/shortcut": r"layer\1.\2.shortcut.0",
    r"linear": r"linear",
}
_IMAGENET = _BOTH | {
    r"layer(\d+)_(\d+)/shortcut": r"layer\1.\2.downsample.0",
    r"linear": r"fc",
}


def rules(layers: tuple[LayerSpec, ...]) -> dict[str, str]:
    """{regular expression for our path in the backbone: the PyTorch name}, by the layers of the backbone."""
    stem = layers[0].kernel
    return _IMAGENET if stem[0] == 7 else _CIFAR
