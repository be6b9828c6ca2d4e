"""Group magnitude, the default of Torch-Pruning: channels go whose weights are small in all layers that they join.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. Channels that a shortcut adds go together. The
original also takes channels of shortcuts without parameters, which join fewer channels to more.
"""

import dataclasses

import numpy as np

from advmoe_jax.core.fields import setting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("DepGraph", "CVPR 2023", "channel", leaves_out="channels of shortcuts without parameters")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    coupled: bool = setting(False, "also channels that shortcuts add, in all their layers at once")


def coupled(cfg: Config) -> bool:
    """Whether channels that several layers write may go."""
    return cfg.coupled


def scores(subject: Subject, cfg: Config) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}: squares summed in each layer, the mean of layers, over that of channels."""
    found = {}
    for group in subject.channels(cfg.coupled):
        parts = [sum(np.square(rows).sum(1) for rows in subject.filters(spec)) for spec in group.writers]
        parts += [np.square(subject.leaf(f"{spec.norm}/scale")) for spec in group.writers
                  if spec.norm and subject.has(f"{spec.norm}/scale")]
        parts += [np.square(subject.inputs(spec)).sum(1) for spec in group.readers]
        mean = np.mean(parts, 0)
        found[group.name] = mean / max(mean.mean(), np.finfo(float).tiny)
    return found
