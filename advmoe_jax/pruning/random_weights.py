"""Random weights go, or units of them: what any other choice has to beat at the same sparsity."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core.fields import setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.pruning import magnitude, scored
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("random weights", "", "weight")


@dataclasses.dataclass(frozen=True)
class Config(magnitude.Config):
    """Fields of `config.system` for this method."""

    method_seed: int = setting(0, "of what the method draws", least=0, most=2**32 - 1)


def score(subject: Subject, cfg: Config) -> dict[str, jax.Array]:
    """{path of a layer: array like its kernel}, signed, where a search begins that knows nothing of the weights."""
    return scored.signed(subject, {spec.path: _drawn(spec, cfg).astype(np.float64) for spec in subject.convs})


def _drawn(spec: LayerSpec, cfg: Config) -> np.ndarray:
    return np.random.default_rng([cfg.method_seed, zlib.crc32(spec.path.encode())]).random(spec.kernel, np.float32)


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    scores = {spec.path: jnp.asarray(_drawn(spec, cfg)) for spec in selecting.with_unit(subject.convs, cfg.unit)}
    return selecting.select(scores, 1 - subject.rate, unit=cfg.unit, scope=cfg.scope), {}
