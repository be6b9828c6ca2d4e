"""The description of a layer that counting, pruning, export and import read."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One convolution or linear layer of a network.

    Attributes:
        path: where its parameters are, "backbone/layer1_0/conv1".
        kernel: stored kernel shape, (k, k, C_in, C_store) or (C_in, C_out).
        width: output channels that one image computes; less than C_store in a routed layer.
        stride: of the convolution; 1 for a linear layer.
        out_size: (H, W) of the output; (1, 1) for a linear layer.
        norm: path of the BatchNorm that follows, None if there is none.
        inputs: paths of the layers whose outputs, after addition, it reads; empty for the image.
        torch_name: name in the PyTorch models of the field, "layer1.0.conv1".
        routed: whether each image takes one expert's channels.
    """

    path: str
    kernel: tuple[int, ...]
    width: int
    stride: int
    out_size: tuple[int, int]
    norm: str | None
    inputs: tuple[str, ...]
    torch_name: str
    routed: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates that one image needs (one expert if routed; bias and BatchNorm not counted)."""
        return math.prod(self.kernel[:-1]) * self.width * math.prod(self.out_size)

    @property
    def stored_macs(self) -> int:
        """Multiply-accumulates of all the stored channels."""
        return math.prod(self.kernel) * math.prod(self.out_size)


def consumers(specs: tuple[LayerSpec, ...], path: str) -> tuple[str, ...]:
    """Paths of the layers that read what the layer at `path` writes."""
    return tuple(spec.path for spec in specs if path in spec.inputs)
