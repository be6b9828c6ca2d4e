"""AdvMoE and the trainings that it is compared to, by the names that a config file's argument takes."""

from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import unknown_name

METHODS = {
    "advmoe": dict(system="advmoe", loss="trades", num_experts=2, model_scale=0.5),
    "at_moe": dict(system="standard", loss="trades", num_experts=2, model_scale=0.5),
    "at_sdense": dict(system="standard", loss="trades", num_experts=1, model_scale=0.5),
    "at_dense": dict(system="standard", loss="trades", num_experts=1, model_scale=1.0),
    "natural": dict(system="standard", loss="natural", num_experts=1, model_scale=1.0),
}


def choose(config: ConfigDict, method: str) -> None:
    """Sets system, loss, N and r in place to those of a name in METHODS."""
    if method not in METHODS:
        raise unknown_name("method in the config's argument", method, METHODS)
    values = METHODS[method]
    configs.choose(config, system=values["system"])
    config.system.loss = values["loss"]
    config.model.num_experts, config.model.model_scale = values["num_experts"], values["model_scale"]
