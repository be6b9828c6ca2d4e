"""From scores of single weights to what searches begin with and methods select from."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning import search
from advmoe_jax.pruning.subject import Subject


def signed(subject: Subject, sizes: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Sizes of scores, 0 or more, {path of a layer: array like its kernel}, with the signs of their weights and on the
    scale of `search.scaled`, so that searches step alike whatever the scores are."""
    return {path: search.scaled(jnp.asarray(  # in float64 before, where products of many layers are still finite
        np.sign(subject.leaf(f"{path}/kernel")) * (size / max(np.max(size), np.finfo(np.float64).tiny)), jnp.float32))
        for path, size in sizes.items()}


def largest(subject: Subject, scores: Mapping[str, jax.Array], cfg: Any) -> dict[str, jax.Array]:
    """{path of a layer: mask}: what `cfg.unit` and `cfg.scope` select of the sizes of scores."""
    kept = {spec.path: jnp.abs(scores[spec.path]) for spec in selecting.with_unit(subject.convs, cfg.unit)}
    return selecting.select(kept, 1 - subject.rate, unit=cfg.unit, scope=cfg.scope)
