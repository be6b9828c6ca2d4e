"""The networks that benchmarks time: ResNet-18 at CIFAR shapes with random weights, and choices of a given load."""

import jax
import numpy as np

from advmoe_jax.core import config
from advmoe_jax.models import network
from advmoe_jax.models.network import Network

IMAGE_SHAPE, CLASSES = (32, 32, 3), 10


def make(**model) -> tuple[Network, dict]:
    """A network and its variables. `model`: fields of `config.model` that differ from the default."""
    cfg = config.default().model
    cfg.update(model)
    net = network.make(cfg, IMAGE_SHAPE, CLASSES)
    return net, jax.jit(net.init)(jax.random.key(0))


def images(batch: int) -> jax.Array:
    """(B, 32, 32, 3) in [0, 1]."""
    return jax.random.uniform(jax.random.key(1), (batch, *IMAGE_SHAPE))


def load(batch: int, num_experts: int, num_choices: int, first: float) -> np.ndarray:
    """(B, L) experts in random order, of which the first gets the share `first`, and the others the rest evenly."""
    shares = np.full(num_experts, (1 - first) / (num_experts - 1))
    shares[0] = first
    ends = np.round(np.cumsum(shares) * batch)
    experts = np.searchsorted(ends, np.arange(batch), side="right").astype(np.int32)
    numbers = np.random.default_rng(0)
    return np.stack([numbers.permutation(experts) for _ in range(num_choices)], 1)
