"""Magnitude: the smallest weights go, or units of them. Han et al., NeurIPS 2015; R-LWM in the pralab benchmark."""

import dataclasses

import jax.numpy as jnp

from advmoe_jax.core.fields import setting
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("magnitude", "NeurIPS 2015", "weight")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    unit: str = setting("weight", f"what goes: {', '.join(selecting.UNITS)}", read=selecting.check_unit)
    scope: str = setting("layer", "the same share of each layer, or of all together", choices=("layer", "global"))


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    kernels = {spec.path: jnp.abs(jnp.asarray(subject.leaf(f"{spec.path}/kernel"), jnp.float32))
               for spec in selecting.with_unit(subject.convs, cfg.unit)}
    norm = "l1" if cfg.unit == "weight" else "l2"
    return selecting.select(kernels, 1 - subject.rate, unit=cfg.unit, scope=cfg.scope, norm=norm), {}
