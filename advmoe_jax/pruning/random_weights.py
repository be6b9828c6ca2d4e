"""Random weights go, or units of them: what any other choice has to beat at the same sparsity."""

import dataclasses
import zlib

import jax.numpy as jnp
import numpy as np

from advmoe_jax.core.fields import setting
from advmoe_jax.pruning import magnitude
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("random weights", "", "weight")


@dataclasses.dataclass(frozen=True)
class Config(magnitude.Config):
    """Fields of `config.system` for this method."""

    method_seed: int = setting(0, "of what the method draws", least=0, most=2**32 - 1)


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    scores = {spec.path: jnp.asarray(np.random.default_rng([cfg.method_seed, zlib.crc32(spec.path.encode())]).random(
        spec.kernel, np.float32)) for spec in selecting.with_unit(subject.convs, cfg.unit)}
    return selecting.select(scores, 1 - subject.rate, unit=cfg.unit, scope=cfg.scope), {}
