"""L1Norm: filters of small l1 norm go.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017. Its networks A and B remove different shares of the
stages; here the shares are raised together until the budget is met, as SR-GKP does for its comparison. The layers that
the original leaves alone by hand are named by `skip`.
"""

import dataclasses
from fractions import Fraction

import numpy as np

from advmoe_jax.core.fields import setting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("L1Norm", "ICLR 2017", "filter", leaves_out="the list of layers that it skips by hand",
              setup="shares raised to the budget")
_SHARES = {"A": (1,), "B": (Fraction(6, 10), Fraction(3, 10), Fraction(1, 10))}  # of the stages; the last of all later


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    variant: str = setting("A", "A: the same share of every stage; B: more of the early ones, 6 to 3 to 1",
                           choices=tuple(_SHARES))


def scores(subject: Subject, cfg: Config) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}, of which the largest are kept."""
    return {group.name: sum(np.abs(rows).sum(1) for rows in subject.filters(group.writers[0]))
            for group in subject.channels()}


def weights(subject: Subject, cfg: Config) -> dict[str, Fraction | int]:
    """{name of a group: share that is removed, up to a common factor}."""
    groups, shares = subject.channels(), _SHARES[cfg.variant]
    stages = list(dict.fromkeys(group.writers[0].out_size for group in groups))
    return {group.name: shares[min(stages.index(group.writers[0].out_size), len(shares) - 1)] for group in groups}
