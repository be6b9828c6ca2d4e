"""The networks that benchmarks time: ResNet-18 at CIFAR shapes with random weights, and choices of a given load."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import config
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import network
from advmoe_jax.models.network import Network
from advmoe_jax.ops import routing
from advmoe_jax.train import log

IMAGE_SHAPE, CLASSES = (32, 32, 3), 10
MODEL = {"model.width": 64, "model.depth": 18}


def design(**model) -> Network:
    """A network without variables. `model`: fields of `config.model` that differ from the default."""
    cfg = config.default()
    cfg.update_from_flattened_dict(MODEL)
    cfg.model.update(model)
    return network.make(cfg.model, IMAGE_SHAPE, CLASSES)


def make(**model) -> tuple[Network, dict]:
    """The network of `design`, and its variables."""
    net = design(**model)
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


def route(net: Network, batch: int, shares: np.ndarray) -> routing.Route:
    """Given choices of every choosing layer, of the `load` with `shares`; a network of one expert has none to make."""
    if net.num_experts == 1:
        return routing.hard()
    return routing.fixed(load(batch, np.broadcast_to(shares, (num_choices(net), net.num_experts))))


def num_choices(net: Network) -> int:
    """L."""
    return 1 if net.one_choice else sum(spec.routed for spec in net.layers)


def first_takes(first: float, num_experts: int) -> np.ndarray:
    """(E,) shares of the experts, of which the first gets `first`, and the others the rest evenly."""
    return np.array([first, *[(1 - first) / (num_experts - 1)] * (num_experts - 1)])


def trained(workdir: Path) -> np.ndarray:
    """(L, E) shares of the experts in every choosing layer at the end of a run: means over the last logged window of
    training batches, in the last of the updates.

    Raises:
        UserError: the folder holds no run of a routed model.
    """
    records = log.Metrics(workdir / "metrics.jsonl").read() if workdir.is_dir() else ()
    loads = [value for record in records for name, value in record.items() if name.endswith("/load")]
    if not loads:
        raise UserError(f"--workdir is {workdir}: expected the folder of a run of a routed model, with metrics.jsonl")
    return np.array(loads[-1])


def load(batch: int, shares: np.ndarray) -> np.ndarray:
    """(B, L) experts in random order, of which each gets its share (L, E) of the images."""
    numbers = np.random.default_rng(0)
    return np.stack([numbers.permutation(np.searchsorted(
        np.round(np.cumsum(of) * batch), np.arange(batch), side="right").astype(np.int32)) for of in shares], 1)
