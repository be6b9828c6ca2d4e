"""Robust Scratch Tickets: the masks of a network that is never trained are searched for on attacked images.

Fu et al., "Drawing Robust Scratch Tickets", NeurIPS 2021, after Ramanujan et al., CVPR 2020. Every weight of a layer is
one constant, sqrt(2 / fan-in), with a random sign, and norms neither scale nor shift; scores, random at first, are
trained as in a search for masks (`systems.mask_search`). A run with system.method=given may train what is left.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from advmoe_jax.core import rng
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.systems import mask_search
from advmoe_jax.systems.sources import Source
from advmoe_jax.train.system import System

_ROOM = mask_search.ROOM


@dataclasses.dataclass(frozen=True)
class Config(mask_search.Config):
    """Fields of `config.system`: those of a search for masks."""

    score: str = setting("random_weights", "what the scores begin as, a module of advmoe_jax.pruning", room=_ROOM)


def check(config) -> None:
    """Raises UserError for a run that starts from another one, or asks for what excludes each other."""
    if config.init_from:
        raise UserError(f"init_from is {config.init_from!r}: expected nothing with system.name=rst, whose weights are "
                        "random")
    mask_search.check_search(config)


def make(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    variables = jax.device_get(jax.jit(model.init)(rng.key(cfg.seed, "rst")))
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _constant(trees.path_name(path), leaf),
                                              variables["params"])
    scratch = Source(None, cfg, model, variables | {"params": params}, {}, 0)
    built = mask_search.make(cfg, model, data, mesh, {"random weights": scratch})
    return dataclasses.replace(built, describe=f"RST: {built.describe}")


def _constant(path: str, leaf: Any) -> np.ndarray:
    """A kernel as signs of one size; norms and biases as they begin."""
    if not path.endswith("/kernel"):
        return np.asarray(leaf)
    size = math.sqrt(2 / math.prod(leaf.shape[:-1]))
    return np.where(np.asarray(leaf) < 0, np.float32(-size), np.float32(size))
