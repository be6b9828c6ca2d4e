"""One routed layer: every expert, blocks of images, and S-Dense, which is one expert for all images.

3x3 convolutions of ResNet-18 at CIFAR shapes, random weights; each expert gets as many images as the others.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.ops import dispatch, routing
from advmoe_jax.ops.conv import conv2d
from advmoe_jax.ops.dispatch import Dispatch

_SHAPES = ((32, 64), (16, 128), (8, 256), (4, 512))  # H, C of the dense layer
_CASES = ((2, 0.5, "shared", 64), (4, 0.5, "disjoint", 128), (8, 0.5, "disjoint", 128), (8, 0.125, "shared", 128))


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each number of experts and shape: milliseconds forward, and forward with all gradients."""
    return [_row(case, shape, rounds) for case in _CASES for shape in _SHAPES]


def _row(case, shape, rounds):
    (num_experts, scale, experts, batch), (height, channels) = case, shape
    width = int(scale * channels)
    starts = routing.offsets(num_experts, width, channels, experts)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, height, height, width))
    stored = num_experts * width if experts == "disjoint" else channels
    kernel = jax.random.normal(keys[1], (3, 3, width, stored)) / 30
    dy = jax.random.normal(keys[2], x.shape)
    ids = nets.load(batch, np.full((1, num_experts), 1 / num_experts))[:, 0]
    scores = jax.nn.one_hot(ids, num_experts)

    def routed(kind):
        def layer(x, kernel, scores):
            choice, _ = dispatch.choose(scores, routing.hard("ste_selected"), 0, Dispatch(kind))
            return dispatch.conv(x, kernel, choice, starts, width, 1)
        return layer

    def s_dense(x, kernel, scores):
        return conv2d(x, kernel, 1)

    layers = {"all": routed("all"), "blocks": routed("blocks"), "S-Dense": s_dense}
    kernels = dict.fromkeys(layers, kernel) | {"S-Dense": kernel[..., :width]}
    row = {"N": num_experts, "r": scale, "experts": experts, "B": batch, "H": height, "C": channels,
           "all / blocks by MACs": stored / width}
    for what, function in (("forward", _forward), ("with gradients", _gradients)):
        ms = interleaved({name: functools.partial(jax.jit(function(layer)), dy, x, kernels[name], scores)
                          for name, layer in layers.items()}, (), rounds)
        row |= {f"{what}: S-Dense ms": ms["S-Dense"], f"{what}: all ms": ms["all"], f"{what}: blocks ms": ms["blocks"],
                f"{what}: all / blocks": ms["all"] / ms["blocks"],
                f"{what}: blocks / S-Dense": ms["blocks"] / ms["S-Dense"]}
    return row


def _forward(layer):
    return lambda dy, *inputs: layer(*inputs)


def _gradients(layer):
    """The value too, or the forward pass of a layer that does not need it for its gradients is dropped."""
    def run(dy, *inputs):
        return jax.value_and_grad(lambda *i: jnp.sum(layer(*i) * dy), argnums=(0, 1, 2))(*inputs)
    return run
