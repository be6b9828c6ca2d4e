"""SFP: after every epoch the filters of the smallest l2 norms are zeroed, and trained on.

He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018. Here whole channels
inside blocks go; the original also zeroes filters whose channels stay in the sum of the shortcut. SR-GKP's table 6
mixes the ranks of the norms with those of smoothness.
"""

import dataclasses

import numpy as np
from scipy.stats import rankdata

from advmoe_jax.core.fields import setting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.srgkp import roughness
from advmoe_jax.pruning.subject import Subject

ABOUT = About("SFP", "IJCAI 2018", "filter", when="soft", leaves_out="filters whose channels a shortcut adds to")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    norm_weight: float = setting(1.0, "weight of the norms' ranks; the rest is that of smoothness, in 3x3 kernels",
                                 least=0, most=1)


def scores(subject: Subject, cfg: Config) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}, l2 norms of filters, or ranks that are mixed with those of smoothness."""
    found = {}
    for group in subject.channels():
        spec = group.writers[0]
        norms = np.sqrt(sum(np.square(rows).sum(1) for rows in subject.filters(spec)))
        if cfg.norm_weight < 1 and spec.kernel[:2] == (3, 3):
            rough = roughness(subject.leaf(f"{spec.path}/kernel")).sum(0).reshape(-1, spec.width).sum(0)
            norms = cfg.norm_weight * rankdata(norms) + (1 - cfg.norm_weight) * rankdata(-rough)
        found[group.name] = norms
    return found
