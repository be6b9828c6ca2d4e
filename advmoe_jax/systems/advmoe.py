"""AdvMoE: router and experts adapt to each other's adversary in alternation.

Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks", ICCV 2023, eq. 3 and
algorithm A1. Lower level: the router phi descends its robust loss with the backbone psi fixed; upper level: psi
descends the TRADES loss with phi fixed. Each level has its own batch, its own attack and its own optimizer.
"""

import dataclasses
from collections.abc import Mapping

import jax

from advmoe_jax.core.errors import UserError
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
    """Fields of `config.system`. Batches, order and loss are the paper's by default; the released code updates the
    backbone first, on the same batch, and trains the router to classify the label modulo E."""

    router_loss: str = setting("trades", "of the router's update; label_mod as released: labels steer the routing",
                               choices=("trades", "label_mod"))
    order: str = setting("router_first", "which level comes first", choices=("router_first", "backbone_first"))
    share_batch: bool = setting(False, "one batch for both levels")
    share_attack: bool = setting(False, "and one adversary, made before the first level's update: cheaper, not exact")
    router_every: int = setting(1, "update the router in every so many iterations: cheaper, not exact", least=1,
                                most=10**6)


def check(config) -> None:
    """Raises UserError for values that make no AdvMoE."""
    system = config.system
    if not HAS_ROUTER.holds(config):
        raise UserError("system.name=advmoe needs model.num_experts of 2 or more: "
                        "a network of one expert, or an ensemble, trains with system.name=standard")
    if system.loss == "natural":
        raise UserError("system.loss=natural has no adversary for system.name=advmoe: expected trades, madry or mart")
    if system.share_attack and not system.share_batch:
        raise UserError("system.share_attack is for levels that attack the same images: expected "
                        "system.share_batch=true with it")


def make(cfg, model: Model, data: Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    router_first, system = cfg.system.order == "router_first", cfg.system
    first = "lower" if router_first else "upper"  # whose batch, crops and attack the other level shares

    def fed(level):
        batch = "lower" if system.share_batch else level
        return Inputs(f"data/{batch}", first if system.share_batch else level,
                      first if system.share_attack else level)

    lower = Update("lower", ("router",), fed("lower"), router_loss=True, every=system.router_every)
    upper = Update("upper", ("backbone",), fed("upper"))
    steers = system.router_loss == "label_mod"
    return build(cfg, model, data, mesh, sources, (lower, upper) if router_first else (upper, lower),
                 "AdvMoE with label_mod: labels steer the routing" if steers else "AdvMoE")
