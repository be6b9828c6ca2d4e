"""The description of a layer that counting, pruning, export and import read."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One convolution or linear layer of a network.

    Attributes:
        path: where its parameters are, "backbone/layer1_0/conv1".
        kernel: stored kernel shape: (k, k, C_in / groups, C_store) or (C_in, C_out); of an attention layer
            (C_in, heads, C_head) or (heads, C_head, C_out); of gathered groups (k, k, kept, C_store).
        width: how much of the kernel's last axis one image computes; less than C_store in a routed layer.
        stride: of the convolution; 1 for a linear layer.
        out_size: (H, W) of the output; (T, 1) for T tokens; (1, 1) for one vector.
        norm: path of the norm that reads the output as it is, None if there is none.
        inputs: paths of the layers whose outputs it reads, in the order in which they are joined; empty for the image.
            An output with fewer channels than the layer reads was padded with empty ones on its way.
        join: how several inputs become one: "add", channel by channel, or "concat", one after the other; where both
            happen, what happened last. "" for a single one. The image counts as one, though `inputs` leaves it out.
        routed: whether each image takes one expert's channels.
        groups: of a grouped convolution.
        is_gathered: whether each of the groups reads input channels of its own choice, which may overlap.
        products: multiply-accumulates of matrix products of its output with what other layers give, such as queries
            times keys, or attention times values; of those that no layer's output enters as it is, none.
    """

    path: str
    kernel: tuple[int, ...]
    width: int
    stride: int
    out_size: tuple[int, ...]
    norm: str | None
    inputs: tuple[str, ...]
    join: str = ""
    routed: bool = False
    groups: int = 1
    is_gathered: bool = False
    products: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the kernel that one image needs (one expert if routed; bias and norm not counted)."""
        return math.prod(self.kernel[:-1]) * self.width * math.prod(self.out_size)

    @property
    def stored_macs(self) -> int:
        """Multiply-accumulates of all the stored channels."""
        return math.prod(self.kernel) * math.prod(self.out_size)


def dotted(path: str) -> str:
    """A path as PyTorch would name it, and pruning.json does: "layer1.0.conv1" of "backbone/layer1_0/conv1"."""
    return path.removeprefix("backbone/").replace("/", ".").replace("_", ".")


def consumers(specs: tuple[LayerSpec, ...], path: str) -> tuple[str, ...]:
    """Paths of the layers that read what the layer at `path` writes."""
    return tuple(spec.path for spec in specs if path in spec.inputs)


def kernels(specs: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Every convolution and linear layer, the first, the last and projection shortcuts too."""
    return tuple(spec for spec in specs if len(spec.kernel) in (2, 4))


def block_convs(specs: tuple[LayerSpec, ...], convs: str = "3x3") -> tuple[LayerSpec, ...]:
    """The convolutions inside blocks: not those that read the image, no projection shortcut, none with groups.

    Args:
        specs: of a network.
        convs: "3x3" or "all", 1x1 ones too.
    """
    def is_shortcut(spec):
        """It reads what another layer reads, and what it gives is added to something."""
        readers = [other for other in specs if spec.path in other.inputs]
        return (any(other.path != spec.path and other.inputs == spec.inputs and len(other.kernel) == 4
                    for other in specs) and all(other.join == "add" for other in readers))

    sizes = {"3x3": (3,), "all": (1, 3)}[convs]
    return tuple(spec for spec in specs if len(spec.kernel) == 4 and spec.kernel[0] == spec.kernel[1] in sizes
                 and spec.groups == 1 and spec.inputs and not (spec.kernel[0] == 1 and is_shortcut(spec)))
