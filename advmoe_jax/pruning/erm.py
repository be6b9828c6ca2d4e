"""Scores of weights by their size: what HYDRA and HARP begin a search with, "ERM" in EED.

Sehwag et al., "HYDRA", NeurIPS 2020. Of every layer the largest score is sqrt(6 / fan-in); scores have the signs of
their weights.
"""

import jax
import jax.numpy as jnp

from advmoe_jax.pruning import magnitude, scored, search
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("ERM", "NeurIPS 2020", "weight")
Config = magnitude.Config


def score(subject: Subject, cfg: Config) -> dict[str, jax.Array]:
    """{path of a layer: array like its kernel}, signed."""
    return {spec.path: search.scaled(jnp.asarray(subject.leaf(f"{spec.path}/kernel"), jnp.float32))
            for spec in subject.convs}


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    return scored.largest(subject, score(subject, cfg), cfg), {}
