"""Training against one of several attacks at a time, drawn by how badly the model stands each: E-AT.

Croce & Hein, "Adversarial robustness against multiple and single lp-threat models via quick fine-tuning of robust
classifiers", ICML 2022: with linf and l1 alone, l2 between them comes for free. The probability of an attack is in
proportion to the robust error that training has met with it so far, so that a step costs one attack.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data.pipeline import Data
from advmoe_jax.models.model import Model
from advmoe_jax.systems import adversarial, adversary
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.sources import Source
from advmoe_jax.train.system import Inputs, System

NAME = "eat"  # of what it owns in State.extra


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    loss: str = setting("madry", "what is trained", choices=("madry", "trades", "mart"))


def check(config) -> None:
    """Raises UserError for fewer than two attacks, or attacks that do not come one at a time."""
    attacks = adversary.named(config, "ce")
    if len(attacks) < 2 or config.train.several != "turn":
        raise UserError(f"train.attack is {config.train.attack!r} and train.several {config.train.several}: expected "
                        "two attacks or more, and several turn, with system.name=eat, which draws one for a step")


def make(cfg, model: Model, data: Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    count = len(adversary.named(cfg, "ce"))

    def begin(state):
        return state.replace(extra={**state.extra, NAME: {"right": jnp.zeros(count), "steps": jnp.zeros(count)}})

    return build(cfg, model, data, mesh, sources, (Update("train", model.groups, Inputs("data", "train", "train")),),
                 f"E-AT({model.kind}) by {cfg.system.loss}", begin=jax.jit(begin), turn=_drawn, track=_counted)


def errors(found: Mapping[str, jax.Array]) -> jax.Array:
    """(A,) robust error of training so far under each attack; 1/2 of each until all have been met."""
    met = jnp.all(found["steps"] > 0)
    return jnp.where(met, 1 - found["right"] / jnp.maximum(found["steps"], 1), 0.5)


def _drawn(state, key):
    return jax.random.categorical(key, jnp.log(errors(state.extra[NAME]) + 1e-9))


def _counted(state, batch, metrics):
    found, which = state.extra[NAME], batch["turn"][0]
    return state.replace(extra=state.extra | {NAME: {
        "right": found["right"].at[which].add(metrics["ra"]), "steps": found["steps"].at[which].add(1)}})
