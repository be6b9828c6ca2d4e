"""The small network that attacks are compared on, in JAX and in PyTorch with the same weights.

Convolutions 3x3: 3 -> 16, 16 -> 32 with stride 2, 32 -> 64 with stride 2; global average pool; K classes. B batch.
"""

from typing import Any

import jax
import numpy as np

from advmoe_jax.ops.conv import conv2d, patches_conv2d

_SHAPES, _STRIDES = ((3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 64)), (1, 2, 2)


def init(seed: int, num_classes: int = 10) -> dict[str, Any]:
    """Weights, He initialised, as numpy arrays."""
    numbers = np.random.default_rng(seed)

    def normal(shape, deviation):
        return (numbers.standard_normal(shape) * deviation).astype(np.float32)

    return {"kernels": [normal(s, np.sqrt(2 / np.prod(s[:3]))) for s in _SHAPES],
            "biases": [np.zeros(s[-1], np.float32) for s in _SHAPES],
            "head": normal((_SHAPES[-1][-1], num_classes), 1 / 8), "head_bias": np.zeros(num_classes, np.float32)}


def apply(weights: dict[str, Any], x: jax.Array, conv=conv2d) -> jax.Array:
    """(B, H, W, 3) in [0, 1] -> logits (B, K)."""
    h = x - 0.5
    for stride, kernel, bias in zip(_STRIDES, weights["kernels"], weights["biases"]):
        h = jax.nn.relu(conv(h, kernel, stride) + bias[None, None, None])
    return h.mean((1, 2)) @ weights["head"] + weights["head_bias"][None]


def apply_patches(weights: dict[str, Any], x: jax.Array) -> jax.Array:
    """As `apply`, every convolution a matrix product over patches."""
    return apply(weights, x, patches_conv2d)


def in_torch(weights: dict[str, Any]) -> Any:
    """The network as a torch module in evaluation, without gradients to its weights; it takes (B, 3, H, W)."""
    import torch

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = torch.nn.ModuleList(
                torch.nn.Conv2d(s[2], s[3], 3, stride, 1) for s, stride in zip(_SHAPES, _STRIDES))
            self.head = torch.nn.Linear(*weights["head"].shape)

        def forward(self, x):
            h = x - 0.5
            for conv in self.convs:
                h = torch.relu(conv(h))
            return self.head(h.mean((2, 3)))

    def tensor(array):
        return torch.from_numpy(np.array(array))

    twin = Twin().eval()
    with torch.no_grad():
        for conv, kernel, bias in zip(twin.convs, weights["kernels"], weights["biases"]):
            conv.weight.copy_(tensor(kernel).permute(3, 2, 0, 1))
            conv.bias.copy_(tensor(bias))
        twin.head.weight.copy_(tensor(weights["head"]).T)
        twin.head.bias.copy_(tensor(weights["head_bias"]))
    return twin.requires_grad_(False)


def to_torch(x: np.ndarray) -> Any:
    """(B, H, W, C) numpy -> (B, C, H, W) torch."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


def from_torch(x: Any) -> np.ndarray:
    """(B, C, H, W) torch -> (B, H, W, C) numpy."""
    return np.moveaxis(x.detach().numpy(), 1, -1)
