"""OTO's idea: redundant channels are chosen once, and fade to zero while the network trains.

Chen et al., "OTOv2: Automatic, Generic, User-Friendly", ICLR 2023, as its successor HESSO does it: over a period of T
iterations what is redundant is multiplied by (T - t - 1) / (T - t). OTOv2's half-space projection and HESSO's other
saliencies are left out.
"""

import dataclasses

import numpy as np
from scipy.stats import rankdata

from advmoe_jax.core import units
from advmoe_jax.core.fields import setting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("OTO (HESSO)", "ICLR 2023", "filter", reads=("gradients",), when="decay",
              leaves_out="the half-space projection, a warm-up, several pruning periods")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    decay_length: str = setting("20%", "how long channels fade, in epochs, steps or % of training", read=units.length)


def scores(subject: Subject, cfg: Config) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}: ranks of magnitude less those of the cosine of weights and the step down.

    A filter is redundant if it is small, and if descending the loss makes it smaller.
    """
    gradients, found = subject.gradients(), {}
    for group in subject.channels():
        path = f"{group.name}/kernel"
        rows = np.concatenate(subject.filters(group.writers[0]), 1)
        down = -np.mean([np.concatenate(subject.filters(group.writers[0], of[path]), 1) for of in gradients], 0)
        size = np.linalg.norm(rows, axis=1)
        cosine = (rows * down).sum(1) / np.maximum(size * np.linalg.norm(down, axis=1), np.finfo(float).tiny)
        found[group.name] = rankdata(size) + rankdata(cosine)
    return found
