"""The networks that benchmarks time: ResNet-18 at CIFAR shapes with random weights, and choices of a given load."""

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import config
from advmoe_jax.models import network
from advmoe_jax.models.network import Network
from advmoe_jax.ops import routing

IMAGE_SHAPE, CLASSES = (32, 32, 3), 10
MODEL = {"model.width": 64, "model.depth": 18}


def make(**model) -> tuple[Network, dict]:
    """A network and its variables. `model`: fields of `config.model` that differ from the default."""
    cfg = config.default()
    cfg.update_from_flattened_dict(MODEL)
    cfg.model.update(model)
    net = network.make(cfg.model, IMAGE_SHAPE, CLASSES)
    return net, jax.jit(net.init)(jax.random.key(0))


def settled(net: Network, variables: dict) -> dict:
    """Variables with the statistics of random images, and a router of one choice that spreads them over the experts:
    fresh ones send all to one, which costs less."""
    x = images(32)
    train = jax.jit(net.apply_train)
    _, aux, stats = train(variables, x)
    # Training keeps 0.9 of the old statistics; those of the batch alone are wanted.
    stats = jax.tree.map(lambda old, new: old + (new - old) / 0.1, variables["batch_stats"], stats)
    variables = {"params": dict(variables["params"]), "batch_stats": stats}
    if net.one_choice:
        scores = aux["router_logits"][:, 0]
        fc = variables["params"]["router"]["fc"]
        variables["params"]["router"] |= {"fc": fc | {"bias": fc["bias"] - jnp.median(scores, 0)}}
    return variables


def images(batch: int) -> jax.Array:
    """(B, 32, 32, 3) in [0, 1]."""
    return jax.random.uniform(jax.random.key(1), (batch, *IMAGE_SHAPE))


def route(net: Network, batch: int, first: float) -> routing.Route:
    """Given choices of every choosing layer, of the `load` with `first`; a network of one expert has none to make."""
    if net.num_experts == 1:
        return routing.hard()
    num_choices = 1 if net.one_choice else sum(spec.routed for spec in net.layers)
    return routing.fixed(load(batch, net.num_experts, num_choices, first))


def load(batch: int, num_experts: int, num_choices: int, first: float) -> np.ndarray:
    """(B, L) experts in random order, of which the first gets the share `first`, and the others the rest evenly."""
    shares = np.full(num_experts, (1 - first) / (num_experts - 1))
    shares[0] = first
    ends = np.round(np.cumsum(shares) * batch)
    experts = np.searchsorted(ends, np.arange(batch), side="right").astype(np.int32)
    numbers = np.random.default_rng(0)
    return np.stack([numbers.permutation(experts) for _ in range(num_choices)], 1)
