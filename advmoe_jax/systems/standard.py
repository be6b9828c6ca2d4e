"""One update of all parameters: natural training, Madry, TRADES and MART.

On a dense network AT(Dense), on a narrowed one AT(S-Dense), and on a mixture of experts, whose router and experts
then train jointly, AT(MoE), the baseline of the AdvMoE paper.
"""

import jax
import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.models.network import Network
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.train.system import System


def make(cfg, network: Network, indices: np.ndarray, mesh: jax.sharding.Mesh) -> System:
    """Builds the system; `system.loss` says which training it is. Arguments as `systems.adversarial.build`.

    Raises:
        UserError: a field asks for what only AdvMoE does.
    """
    if cfg.system.router_loss == "label_mod":
        raise UserError("system.router_loss=label_mod is a loss of the router's own update, which system.name=standard "
                        "does not have: expected trades, or system.name=advmoe")
    one_level = {"share_batch": False, "share_attack": False, "router_every": 1, "order": "router_first"}
    for field, value in one_level.items():
        if cfg.system[field] != value:
            raise UserError(f"system.{field} is {cfg.system[field]}, which is for two levels, and system.name=standard "
                            f"has one: expected {value}, or system.name=advmoe")
    kind = "MoE" if network.num_experts > 1 else "Dense" if cfg.model.model_scale == 1 else "S-Dense"
    name = f"natural {kind}" if cfg.system.loss == "natural" else f"AT({kind}) by {cfg.system.loss}"
    return build(cfg, network, indices, mesh, (Update("train", network.groups, "data"),), name)
