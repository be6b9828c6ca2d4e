"""Scores of weights by their size behind the norm that follows: |scale * w / deviation|, "BNSF" in EED.

Vemparala et al., "Adversarial robust model compression using in-train pruning", CVPRW 2021, whose effective weights EED
(CVPR 2025, eq. 11) takes. A layer without a norm keeps its weights as they are.
"""

import jax
import numpy as np

from advmoe_jax.pruning import magnitude, scored
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("BNSF", "CVPRW 2021", "weight")
Config = magnitude.Config


def score(subject: Subject, cfg: Config) -> dict[str, jax.Array]:
    """{path of a layer: array like its kernel}, signed."""
    return scored.signed(subject, {
        spec.path: np.abs(subject.leaf(f"{spec.path}/kernel")) * subject.stored(spec, subject.norm_factor(spec))
        for spec in subject.convs})


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    return scored.largest(subject, score(subject, cfg), cfg), {}
