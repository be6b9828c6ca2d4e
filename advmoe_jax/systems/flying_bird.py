"""Flying Bird: a network is sparse from the first step on, and which weights it has changes while it trains.

Chen et al., "Sparsity Winning Twice: Better Robust Generalization from More Efficient Training", ICLR 2022, after RigL
(Evci et al., ICML 2020). Each layer has a share of its weights by Erdos-Renyi kernels, random ones at first. From time
to time the smallest of them go and as many others come, at zero; the share that changes falls along a cosine. It adapts
no sparsity (their Flying Bird+).
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from advmoe_jax.core import rng, shares, tree, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning import pruned
from advmoe_jax.systems import adversarial
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.prune import is_rate
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import state as states
from advmoe_jax.train.state import State
from advmoe_jax.train.system import Inputs, System

_HALVINGS = 50


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    rate: str = setting("4/5", "share of the weights of all layers together that it lacks", read=is_rate)
    skip: str = setting("(^|/)router/", "regular expression; layers whose path has a match stay whole")
    change_every: str = setting("1 epochs", "when weights go and come; in the paper 900 steps", read=units.length)
    drop: float = setting(0.5, "share of a layer's weights that change at first", above=0, most=1)
    last_drop: float = setting(0.005, "and at the end", least=0, most=1)


def check(config) -> None:
    """Raises UserError for weights that never change, or a run that starts from another one."""
    if units.length(config.system.change_every)[0] == 0:
        raise UserError(f"system.change_every is {config.system.change_every!r}: expected more than nothing, such as "
                        "'1 epochs'")
    if config.init_from:
        raise UserError(f"init_from is {config.init_from!r}: expected nothing with system.name=flying_bird, which is "
                        "sparse from its first step on")


def erdos_renyi(layers: tuple[LayerSpec, ...], keep: float) -> dict[str, float]:
    """{path of a layer: share of its weights}, in proportion to the sum over the product of its sizes, at most 1; all
    together keep the share `keep`. Evci et al., ICML 2020."""
    odds = {spec.path: sum(spec.kernel) / math.prod(spec.kernel) for spec in layers}
    sizes = {spec.path: math.prod(spec.kernel) for spec in layers}
    low, high = 0.0, 1 / min(odds.values())
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = sum(min(1, middle * odds[path]) * sizes[path] for path in sizes)
        low, high = (middle, high) if kept < keep * sum(sizes.values()) else (low, middle)
    return {path: min(1, low * odds[path]) for path in sizes}


def make(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    system = cfg.system
    _, layers = pruned.layers_of_rate(model.layers, "every", system.skip)
    keep = {f"{path}/kernel": max(share, 1e-6) for path, share in erdos_renyi(
        layers, float(1 - shares.share(system.rate))).items()}
    key = rng.key(cfg.seed, "flying_bird")

    def begin(state: State) -> State:
        kernels = states.parameters(state, keep)
        scores = _random(rng.stream(key, "first"), {path: leaf.shape for path, leaf in kernels.items()})
        masks = {path: selecting.select({path: of}, keep[path])[path] for path, of in scores.items()}
        return states.masked(states.with_masks(state, masks))

    built = build(cfg, model, data, mesh, sources, (Update("train", model.groups, Inputs("data", "train", "train")),),
                  f"Flying Bird, {model.kind} by {system.loss} without {system.rate} of its weights",
                  begin=jax.jit(begin))

    def change(state: State) -> State:
        part = jnp.minimum(state.step / max(built.length, 1), 1)
        share = system.last_drop + (system.drop - system.last_drop) * (1 + jnp.cos(jnp.pi * part)) / 2
        kernels, masks = states.parameters(state, keep), tree.named_leaves(state.masks)
        noise = _random(jax.random.fold_in(key, state.step), {path: leaf.shape for path, leaf in kernels.items()})
        found = {path: changed(leaf, masks[path], share, noise[path]) for path, leaf in kernels.items()}
        return states.masked(states.with_masks(_rested(state), found))

    return built.also(system.change_every, jax.jit(change, donate_argnums=0))


def changed(kernel: jax.Array, mask: jax.Array, share: jax.Array, noise: jax.Array) -> jax.Array:
    """The mask without the smallest `share` of what it keeps, and with as many others, which are drawn.

    Args:
        kernel: weights.
        mask: bool of its shape.
        share: () of the weights that it keeps.
        noise: random numbers above 0 like it.
    """
    alive = jnp.sum(mask)
    gone = jnp.minimum(jnp.floor(share * alive + 1e-4).astype(alive.dtype), mask.size - alive)
    stays = selecting.largest(jnp.where(mask, 1 + jnp.abs(kernel), 0), alive - gone)
    comes = selecting.largest(jnp.where(mask, 0, noise), gone)
    return stays | comes


def _random(key: jax.Array, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    return {path: jax.random.uniform(rng.stream(key, path), shape, minval=1e-6) for path, shape in shapes.items()}


def _rested(state: State) -> State:
    """The state in which optimizers remember nothing of weights that it lacks, so that they come to rest."""
    opt = dict(state.opt)
    for group, masks in state.masks.items():
        named = tree.named_leaves(masks)

        def rest(path, leaf, named=named):
            place = tree.path_name(path)
            name = max((of for of in named if f"/{place}".endswith(f"/{of}")), key=len, default=None)
            return leaf if name is None or leaf.shape != named[name].shape else jnp.where(named[name], leaf, 0)

        opt[group] = jax.tree_util.tree_map_with_path(rest, opt[group])
    return state.replace(opt=opt)
