"""Prunes a finished run by one of the methods of `advmoe_jax.pruning`, then trains what is left by the ordinary losses.

What is left of each layer is written to pruning.json before the first step.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import find, layer_spec, masked, shares, tree, units
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.core.layer_spec import LayerSpec, dotted
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.ops import masks as masking
from advmoe_jax.pruning import pruned as pruning
from advmoe_jax.pruning.pruned import Pruned
from advmoe_jax.pruning.subject import KERNELS
from advmoe_jax.systems import adversarial, adversary
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.sources import Source, initial, needed
from advmoe_jax.train import state as states
from advmoe_jax.train.state import State
from advmoe_jax.train.system import Inputs, System

_NEEDS_IMAGES = Only("a system.method that reads gradients or features", lambda config: _about(config).needs_images)
_ANY_IMAGES = Only("a system.method that reads those of any images", lambda config: (
    _about(config).needs_images and not _about(config).attacked))
_TOLD = Only("a system.method that is told how much goes", lambda config: _about(config).is_told)


def _about(config):
    return find.module(pruning.ROOM[0], config.system.method, defines=pruning.ROOM[1:], kind="system.method").ABOUT


def own_config(module: Any, system: Any) -> Any:
    """The Config of a module of the pruning room with its fields of `config.system`; None if it has none."""
    own = getattr(module, "Config", None)
    return own(**{field.name: system[field.name] for field in dataclasses.fields(own)}) if own else None


def is_rate(value: str, name: str) -> None:
    """Raises UserError unless it reads as a share above 0 and below 1."""
    if not 0 < shares.share(value, name) < 1:
        raise UserError(f"{name} is {value!r}: expected more than 0 and less than 1, such as '7/16'")


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`, beside those of the method."""

    loss: str = setting("natural", "of training what is left", choices=adversarial.LOSSES)
    method: str = setting("srgkp", "a module of advmoe_jax.pruning", room=pruning.ROOM)
    rate: str = setting("7/16", "share of the multiply-accumulates of the layers in system.kernels that goes",
                        read=is_rate, only=_TOLD)
    kernels: str = setting("3x3", "convolutions in blocks that the rate is of; or, for methods that remove weights, "
                                  "every convolution and linear layer", choices=KERNELS)
    skip: str = setting("(^|/)router/", "regular expression; layers whose path has a match stay whole")
    images: int = setting(256, "training images that scores are made of", least=1, most=10**6, only=_NEEDS_IMAGES)
    scored_on: str = setting("clean", "those images, or what the first of train.attack makes of them",
                             choices=("clean", "attacked"), only=_ANY_IMAGES)


def check(config) -> None:
    """Raises UserError for a run that has nothing to prune."""
    needed(config)


def make(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    system, about = cfg.system, _about(cfg)
    amount = f" at {system.rate}" if about.is_told else ""
    title = f"{model.kind} pruned by {about.title}{amount}, then {system.loss}"
    updates = (Update("train", model.groups, Inputs("data", "train", "train")),)
    if not sources:  # it is evaluated alone
        return build(cfg, model, data, mesh, sources, updates, title)
    variables, inherited = initial(model, sources, cfg.seed)
    scored_on = "attacked" if about.attacked else system.scored_on
    x, y = score_images(cfg, model, data, variables, scored_on) if about.needs_images else (None, None)

    def chosen(variables):
        subject = pruning.of(logits_of(model), variables, model.layers, system.rate, system.kernels, system.skip, x, y,
                             tree.named_leaves(inherited))
        return pruning.choose(subject, system.method, method)

    module = find.module(pruning.ROOM[0], system.method, defines=pruning.ROOM[1:])
    method = own_config(module, system)
    first = chosen(variables)
    masks = _masks(first)
    starts = jax.tree.map(np.ones_like, masks) if about.when == "soft" else masks
    built = build(cfg, model, data, mesh, sources, updates, title, masks=starts,
                  after=(lambda state: state) if about.when in ("soft", "decay") else states.masked)
    per_epoch = pipeline.steps_per_epoch(len(data.rows), cfg.data.batch_size)
    more = {}
    if about.when in ("hard", "soft"):
        more = {"1 epochs": lambda state: _again(state, chosen, mesh)}
    elif about.when == "decay":
        more = {"1 steps": _fade(max(units.steps(system.decay_length, per_epoch, built.length), 1))}
        built = dataclasses.replace(built, init=_whole(built.init, variables, mesh))
    return dataclasses.replace(
        built, every={**more, **built.every}, first_best=per_epoch if about.when == "soft" else 0,
        files={"pruning.json": report(first, system) | {"weights": kept_weights(first, model.layers)}},
        describe=f"{title}: MACs {first.macs[0]:,} to {first.macs[1]:,}, parameters {first.params[0]:,} to "
                 f"{first.params[1]:,}")


def report(pruned: Pruned, system: Any) -> dict[str, Any]:
    """What pruning.json says.

    "sha256" is over the compact JSON of ["layer1.0.conv1.weight", order, kept], layer by layer in their order, where
    the method has an order: with it two programs compare their searches.
    """
    layers = {dotted(path): {name: of for name, of in plan.items()} for path, plan in pruned.plan.items()}
    lines = [json.dumps([f"{name}.weight", plan["order"], plan["kept"]], separators=(",", ":"))
             for name, plan in layers.items() if "order" in plan]
    found = {"method": system.method, "title": pruned.about.title,
             "rate": system.rate if pruned.about.is_told else None,
             "macs": dict(zip(("before", "after"), pruned.macs)),
             "params": dict(zip(("before", "after"), pruned.params)),
             "leaves_out": pruned.about.leaves_out, "layers": layers}
    return found | ({"sha256": hashlib.sha256("".join(lines).encode()).hexdigest()} if lines else {})


def kept_weights(pruned: Pruned, layers: tuple[LayerSpec, ...]) -> dict[str, list[int]]:
    """{"layer1.0.conv1": [weights that are kept, all]} of every convolution and linear layer, in their order."""
    shapes = {name: leaf.shape for name, leaf in tree.named_leaves(pruned.variables["params"]).items()}
    kept = masked.shares(shapes, pruned.masks)
    sizes = {spec.path: math.prod(shapes[f"{spec.path}/kernel"]) for spec in layer_spec.kernels(layers)}
    return {dotted(path): [int(kept.get(f"{path}/kernel", 1) * size), size] for path, size in sizes.items()}


def logits_of(model: Model):
    """(variables, x) -> logits of a model as users have it."""
    return lambda variables, x: model.outputs_fn(variables)(x)[0]


def score_images(cfg, model: Model, data: pipeline.Data, variables: Any, scored_on: str
                 ) -> tuple[np.ndarray, np.ndarray]:
    """The first `system.images` training images in [0, 1] and their labels, "clean" or "attacked" by `train.attack`."""
    x, y = pipeline.images_of(data.train, data.rows[:cfg.system.images])
    if scored_on == "attacked":
        attack = adversary.named(cfg, "ce")[0]
        x = attack.in_parts(attack.function(model.outputs_fn(variables)), jax.random.key(cfg.seed), x, y)
    return x, y


def _masks(pruned: Pruned) -> dict[str, Any]:
    """{group: masks} of the groups that have any."""
    return {group: jax.tree.map(np.asarray, part) for group, part in pruned.masks.items() if jax.tree.leaves(part)}


def _again(state: State, chosen, mesh) -> State:
    """The state with masks chosen anew, applied."""
    found = _masks(chosen(jax.device_get(state.variables)))
    return states.masked(state.replace(masks=jax.device_put(found, meshes.replicated(mesh))))


def _fade(period: int):
    """state -> the state in whose parameters what goes has faded by one step of so many; a state is donated."""
    def run(state):
        left = jnp.maximum(period - state.step, 0)
        factor = left / (left + 1)
        params = {group: masking.map_masked(
            lambda leaf, mask: jnp.where(mask != 0, leaf, leaf * factor.astype(leaf.dtype)), part, state.masks[group])
            if group in state.masks else part for group, part in state.params.items()}
        return state.replace(params=params)

    return jax.jit(run, donate_argnums=0)


def _whole(init, variables, mesh):
    """An init whose parameters are not masked yet."""
    def begin(key):
        return init(key).replace(params=jax.device_put(variables["params"], meshes.replicated(mesh)))

    return begin
