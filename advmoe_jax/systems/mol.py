"""Trains a gate before finished experts, with the experts' last layers, against attacks on the whole mixture.

MoL, Cheng et al., WACVW 2022. `init_from` names a run for each expert, each trained against its own perturbation, dense
or pruned; masks stay. `train.attack` names the perturbations, of which `train.several` says how they come: the released
code makes a pass over the images with each adversarial one in turn. All else of the experts rests, bit by bit.
"""

import dataclasses
from collections.abc import Mapping

import jax

from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data.pipeline import Data
from advmoe_jax.models.mixture import GATE
from advmoe_jax.models.model import Model
from advmoe_jax.systems import adversarial
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.sources import Source, needed
from advmoe_jax.train import state as states
from advmoe_jax.train.state import Part
from advmoe_jax.train.system import Inputs, System


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    loss: str = setting("madry", "what is trained; madry: the perturbed images alone, as released",
                        choices=adversarial.LOSSES)
    finetune: str = setting("fc", "what of the experts is trained with the gate: their last layers, all, or nothing",
                            choices=("fc", "all", "none"))


def check(config) -> None:
    """Raises UserError for a model that is no mixture, has no experts to start from, or nothing to train."""
    if config.model.name != "mixture":
        raise UserError(f"model.name is {config.model.name}: expected mixture with system.name=mol, which trains a "
                        "gate and its experts")
    needed(config)
    if config.system.finetune == "none" and config.model.gate == "uniform":
        raise UserError("system.finetune is none and model.gate uniform: expected something to train, finetune fc or a "
                        "trained gate")


def make(cfg, model: Model, data: Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    for name, source in sources.items():
        if source.config.data.name != cfg.data.name:
            raise UserError(f"init_from names {name}, which was trained on {source.config.data.name}: expected experts "
                            f"of {cfg.data.name} (data.name)")
    finetune = cfg.system.finetune
    owns = tuple(group for group in model.groups if finetune != "none" or group == GATE)
    part = _last_layers(model) if finetune == "fc" else states.PARAMETERS
    trained = {"fc": "their last layers", "all": "all of them", "none": "the gate alone"}[finetune]
    return build(cfg, model, data, mesh, sources, (Update("train", owns, Inputs("data", "train", "train")),),
                 f"{model.kind}, {trained} trained by {cfg.system.loss}", part=part)


def _last_layers(model: Model) -> Part:
    """The gate, and of each expert the last linear layer, {path of a leaf below the group: leaf}."""
    last = {spec.path.partition("/")[0]: spec.path.partition("/")[2] for spec in model.layers
            if len(spec.kernel) == 2}

    def is_last(group, path):
        return path.startswith(f"{last[group]}/")

    def get(state):
        return {group: params if group == GATE else {
            path: leaf for path, leaf in tree.named_leaves(params).items() if is_last(group, path)}
            for group, params in state.params.items()}

    def put(state, trees):
        whole = {group: leaves if group == GATE else jax.tree_util.tree_map_with_path(
            lambda path, leaf, leaves=leaves: leaves.get(tree.path_name(path), leaf), state.params[group])
            for group, leaves in trees.items()}
        return state.replace(params={**state.params, **whole})

    return Part(get, put)
