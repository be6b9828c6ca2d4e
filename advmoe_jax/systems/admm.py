"""Trains a finished run towards a pruned copy of itself by ADMM; weights stay dense until a run prunes them.

R-ADMM, Ye et al., "Adversarial robustness vs. model compression, or both?", ICCV 2019, after Zhang et al., ECCV 2018;
the arithmetic is `pruning.admm`. A run with system.method=magnitude and the same kernels, unit and rate then masks what
the copy lacks and trains the rest; it starts from NAME@last, since the best checkpoint of a dense network may be far
from its copy. The paper restarts the learning rate at each update of the copy, which `optim.backbone.schedule` can say.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.pruning import admm, pruned
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning.subject import KERNELS
from advmoe_jax.systems import adversarial
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.prune import is_rate
from advmoe_jax.systems.sources import Source, needed
from advmoe_jax.train import state as states
from advmoe_jax.train.step import Objective
from advmoe_jax.train.system import Inputs, System

NAME = "admm"  # of what it owns in State.extra


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    rate: str = setting("9/10", "share of the units of each layer in system.kernels that the copy lacks", read=is_rate)
    kernels: str = setting("every", "those layers: convolutions in blocks, or every convolution and, where single "
                                    "weights go, linear layer", choices=KERNELS)
    skip: str = setting("(^|/)router/", "regular expression; layers whose path has a match stay whole")
    unit: str = setting("weight", f"what it lacks: {', '.join(selecting.UNITS)}", read=selecting.check_unit)
    rho: float = setting(1e-3, "weight of the distance at first", above=0, most=1e6)
    growth: float = setting(1.3, "factor of rho at each update of the copy", least=1, most=1e3)
    admm_every: str = setting("1 epochs", "when the copy is updated", read=units.length)


def check(config) -> None:
    """Raises UserError for a run that has nothing to compress, or whose copy is never updated."""
    needed(config)
    if units.length(config.system.admm_every)[0] == 0:
        raise UserError(f"system.admm_every is {config.system.admm_every!r}: expected more than nothing, such as "
                        "'1 epochs'")


def make(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    system = cfg.system
    _, layers = pruned.layers_of_rate(model.layers, system.kernels, system.skip, system.unit)
    paths = tuple(f"{spec.path}/kernel" for spec in layers)

    def begin(state):
        return state.replace(extra={**state.extra, NAME: admm.begin(
            states.parameters(state, paths), system.rate, system.unit, system.rho)})

    def update(state):
        return state.replace(extra={**state.extra, NAME: admm.update(
            states.parameters(state, paths), state.extra[NAME], system.rate, system.unit, system.growth)})

    built = build(cfg, model, data, mesh, sources, (Update("train", model.groups, Inputs("data", "train", "train")),),
                  f"{model.kind} by {system.loss}, drawn by ADMM to {system.rate} of its {system.unit}s gone",
                  objective=functools.partial(_objective, paths), begin=jax.jit(begin))
    return built.also(system.admm_every, jax.jit(update, donate_argnums=0))


def _objective(paths: tuple[str, ...], model: Model, cfg, **kind: Any) -> Objective:
    """The ordinary loss and the penalty. The metric "distance" is |W - Z| / |W| over all these kernels."""
    ordinary = adversarial.objective(model, cfg, **kind)

    def run(state, batch):
        loss, (stats, metrics) = ordinary(state, batch)
        kernels, found = states.parameters(state, paths), state.extra[NAME]
        apart = sum(jnp.sum(jnp.square(kernels[path] - found.z[path])) for path in paths)
        size = sum(jnp.sum(jnp.square(kernel)) for kernel in kernels.values())
        return loss + admm.penalty(kernels, found), (stats, metrics | {"distance": jnp.sqrt(apart / size)})

    return run
