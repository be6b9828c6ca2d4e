"""Twin-Rep: every weight is a product of two that are trained, which draws it to zero, and the smallest go early on.

Li et al., "Learning Adversarially Robust Sparse Networks via Weight Reparameterization", AAAI 2023. w, as the model
begins, times a, which begins as w does in PyTorch: U(-1/sqrt(fan-in), 1/sqrt(fan-in)), Kaiming uniform for a leaky ReLU
of slope sqrt(5). Weight decay is on both. A part of the training later the smallest |w a| of all layers together are
masked, and the rest trains on. The state's parameters are always the products, which attacks, evaluations and other
runs read as those of any network. Single weights go; the paper's other form, in which a is a matrix over the output
channels of a layer, is not here.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, shares, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.ops import masks as masking
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning import pruned
from advmoe_jax.systems import adversarial
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.prune import is_rate
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import state as states
from advmoe_jax.train.state import Part, State
from advmoe_jax.train.system import Inputs, System

NAME = "twins"  # of what it owns in State.extra: {group: {"w": tree like its parameters, "a": tree of kernels alone}}


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    rate: str = setting("4/5", "share of the weights of all layers together that goes", read=is_rate)
    skip: str = setting("(^|/)router/", "regular expression; layers whose path has a match stay whole")
    prune_after: str = setting("10%", "length of training before they go; in the paper 10 of 100 epochs",
                               read=units.length)


def check(config) -> None:
    """Raises UserError for weights that go before the first step, or a run that starts from another one."""
    if units.length(config.system.prune_after)[0] == 0:
        raise UserError(f"system.prune_after is {config.system.prune_after!r}: expected more than nothing, such as "
                        "'10%'")
    if config.init_from:
        raise UserError(f"init_from is {config.init_from!r}: expected nothing with system.name=twin_rep, whose weights "
                        "are products from its first step on")


def make(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`.

    Raises:
        UserError: training ends before weights go.
    """
    system = cfg.system
    _, layers = pruned.layers_of_rate(model.layers, "every", system.skip)
    paths, key = tuple(f"{spec.path}/kernel" for spec in layers), rng.key(cfg.seed, "twin_rep")

    def begin(state: State) -> State:
        kernels = states.parameters(state, paths)
        a = masking.of_leaves(state.params, {path: _uniform(rng.stream(key, path), kernel.shape)
                                             for path, kernel in kernels.items()})
        whole = states.with_masks(state, {path: jnp.ones(kernel.shape, bool) for path, kernel in kernels.items()})
        return _put(whole.replace(extra={**state.extra, NAME: {}}), {
            group: {"w": w, "a": a[group]} for group, w in state.params.items()})

    built = build(cfg, model, data, mesh, sources, (Update("train", model.groups, Inputs("data", "train", "train")),),
                  f"Twin-Rep, {model.kind} by {system.loss} without {system.rate} of its weights after "
                  f"{system.prune_after}", begin=begin, part=Part(lambda state: state.extra[NAME], _put))
    per_epoch = pipeline.steps_per_epoch(len(data.rows), cfg.data.batch_size)
    first = max(units.steps(system.prune_after, per_epoch, built.length), 1)
    if first >= built.length:
        raise UserError(f"system.prune_after is {system.prune_after!r}, {first} steps: expected less than the "
                        f"{built.length} of training (train.length)")

    def prune(state: State) -> State:
        if int(state.step) != first:
            return state
        sizes = {path: jnp.abs(kernel) for path, kernel in states.parameters(state, paths).items()}
        found = selecting.select(sizes, 1 - shares.share(system.rate), scope="global")
        return states.masked(states.with_masks(state, jax.device_put(found, meshes.replicated(mesh))))

    return dataclasses.replace(built.also(f"{first} steps", prune), first_best=first)


def _put(state: State, twins: Mapping[str, Any]) -> State:
    """The state with other twins of some groups, and their products, masked, as its parameters."""
    params = {group: _products(of) for group, of in twins.items()}
    params |= {group: masking.apply(params[group], masks) for group, masks in state.masks.items() if group in params}
    return state.replace(params={**state.params, **params},
                         extra={**state.extra, NAME: {**state.extra[NAME], **twins}})


def _products(twins: Mapping[str, Any]) -> Any:
    """w a, and w where there is no a: a copy, as the state is donated, so that no buffer may be in it twice."""
    return jax.tree.map(lambda a, w: jnp.copy(w) if a is None else w * a, twins["a"], twins["w"],
                        is_leaf=lambda leaf: leaf is None)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    most = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, minval=-most, maxval=most)
