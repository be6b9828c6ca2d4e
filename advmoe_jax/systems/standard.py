"""One update: natural training, Madry, TRADES and MART, of all parameters or of the router or the backbone alone.

On a dense network AT(Dense), on a narrowed one AT(S-Dense), on a mixture of experts, whose router and experts then
train jointly, AT(MoE), the baseline of the AdvMoE paper; on an ensemble the training of a team.
"""

import dataclasses
from collections.abc import Mapping

import jax

from advmoe_jax.core.fields import setting
from advmoe_jax.data.pipeline import Data
from advmoe_jax.models.model import Model
from advmoe_jax.models.network import HAS_ROUTER
from advmoe_jax.systems import adversarial
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.sources import Source
from advmoe_jax.train.system import Inputs, System


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    trains: str = setting("all", "parameters that are trained; the others rest", choices=("all", "router", "backbone"),
                          only=HAS_ROUTER)


def make(cfg, model: Model, data: Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system; `system.loss` says which training it is. Arguments as `systems.adversarial.build`."""
    part = cfg.system.trains
    owns = model.groups if part == "all" else (part,)
    name = f"natural {model.kind}" if cfg.system.loss == "natural" else f"AT({model.kind}) by {cfg.system.loss}"
    return build(cfg, model, data, mesh, sources, (Update("train", owns, Inputs("data", "train", "train")),),
                 name if part == "all" else f"{name}, {part} alone")
