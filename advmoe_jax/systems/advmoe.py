"""AdvMoE: router and experts adapt to each other's adversary in alternation.

Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks", ICCV 2023, eq. 3 and
algorithm A1. Lower level: the router phi descends its robust loss with the backbone psi fixed; upper level: psi
descends the TRADES loss with phi fixed. Each level has its own batch, its own attack and its own optimizer.
"""

import jax
import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.train.system import System


def make(cfg, network: Network, indices: np.ndarray, mesh: jax.sharding.Mesh) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`.

    `system.order`, `system.share_batch` and `system.router_loss` are the paper's by default; the released code
    updates the backbone first, on the same batch, and trains the router to classify the label modulo E.

    Two fields change the algorithm to make an iteration cheaper: with `system.share_attack` the level that comes second
    takes the adversarial images of the first, made before that one's update; the router is updated in every
    `system.router_every`-th iteration alone.

    Raises:
        UserError: the network has one expert, or the loss has no adversary.
    """
    if network.num_experts < 2:
        raise UserError("system.name=advmoe needs model.num_experts of 2 or more, got 1: "
                        "a network of one expert trains with system.name=standard")
    if cfg.system.loss == "natural":
        raise UserError("system.loss=natural has no adversary for system.name=advmoe: expected trades, madry or mart")
    if cfg.system.share_attack and not cfg.system.share_batch:
        raise UserError("system.share_attack is for levels that attack the same images: expected "
                        "system.share_batch=true with it")
    if cfg.system.router_every > 1 and cfg.system.order == "backbone_first":
        raise UserError(f"system.router_every is {cfg.system.router_every} and system.order backbone_first, whose "
                        "iterations end with the router: expected 1, or system.order=router_first")
    lower = Update("lower", ("router",), "data/lower", router_loss=True, every=cfg.system.router_every)
    upper = Update("upper", ("backbone",), "data/lower" if cfg.system.share_batch else "data/upper")
    updates = (upper, lower) if cfg.system.order == "backbone_first" else (lower, upper)
    steers = cfg.system.router_loss == "label_mod"
    return build(cfg, network, indices, mesh, updates,
                 "AdvMoE with label_mod: labels steer the routing" if steers else "AdvMoE")
