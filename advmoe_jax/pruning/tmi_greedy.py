"""TMI-GKP's search: in groups of like filters, the kernels that are far apart are kept, found greedily.

Zhong et al., "Revisit Kernel Pruning with Lottery Regulated Grouped Convolutions", ICLR 2022. The original chooses
between three groupings, for each layer, by the weights of past epochs; here filters are grouped by k-means with groups
of equal size, or at random.
"""

import dataclasses
import math

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial import distance

from advmoe_jax.core import shares
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.pruning import srgkp
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("TMI-GKP (greedy)", "ICLR 2022", "grouped kernel",
              leaves_out="the choice between groupings by the weights of past epochs")
_STARTS, _MOST = 10, 300  # of k-means
_NEAREST = 0.2  # share of the kept channels to which a removed one is compared


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    groups: int = setting(8, "n, groups of filters in a layer", least=1, most=4096)
    grouping: str = setting("kmeans", "how filters are grouped", choices=("kmeans", "random"))
    method_seed: int = setting(0, "of what the method draws", least=0, most=2**32 - 1)


def masks(subject: Subject, cfg: Config) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """As `srgkp.masks`."""
    found, plans = {}, {}
    for spec in subject.convs:
        kernel, channels = subject.leaf(f"{spec.path}/kernel"), spec.kernel[-2]
        keep = shares.exact(channels, 1 - subject.rate, f"{spec.path}: the kernels that rate {subject.rate} keeps")
        order, kept, parts = [], [], []
        for window in subject.windows(spec):
            part = kernel[..., window]
            if part.shape[-1] % cfg.groups:
                raise UserError(f"{spec.path}: groups is {cfg.groups}: expected a divisor of the layer's "
                                f"{part.shape[-1]} filters")
            generator = np.random.default_rng(cfg.method_seed)
            labels = _labels(part.reshape(-1, part.shape[-1]).T, cfg.groups, cfg.grouping, generator)
            of = np.argsort(labels, kind="stable")
            layer = srgkp.Plan(of, tuple(
                _greedy(part[..., filters].transpose(2, 3, 0, 1).reshape(channels, -1), keep)
                for filters in of.reshape(cfg.groups, -1)))
            parts.append(srgkp.mask(layer, channels))
            order += [int(filter_) + window.start for filter_ in of]
            kept += map(list, layer.kept)
        found[spec.path] = np.concatenate(parts, -1)
        plans[spec.path] = {"order": order, "kept": kept}
    return found, plans


def _greedy(vectors: np.ndarray, keep: int) -> tuple[int, ...]:
    """The channels kept: from every start the farthest from those kept are added; of all ends the one of least cost."""
    similarity, channels = 1 - distance.cdist(vectors, vectors), len(vectors)
    members, sums = np.eye(channels, dtype=bool), similarity.copy()
    inner, starts = np.zeros(channels), np.arange(channels)
    for _ in range(keep - 1):
        added = np.where(members, np.inf, sums).argmin(-1)
        inner += sums[starts, added]
        members[starts, added] = True
        sums += similarity[added]
    near, gone = max(1, int(_NEAREST * keep)), channels - keep
    beta = math.comb(keep, 2) / (gone * near) if gone else 0.0
    outer = [np.sort(similarity[np.ix_(~of, of)], -1)[:, -near:].sum() for of in members]
    return tuple(map(int, np.flatnonzero(members[np.argmin(inner - beta * np.array(outer))])))


def _labels(rows: np.ndarray, groups: int, grouping: str, generator: np.random.Generator) -> np.ndarray:
    """(O,) the group of each filter, all of equal size."""
    count = len(rows)
    if grouping == "random":
        return generator.permutation(np.arange(count) % groups)
    best, least = None, np.inf
    for _ in range(_STARTS):
        centres, labels = rows[generator.choice(count, groups, replace=False)], None
        for _ in range(_MOST):
            squares = np.repeat(distance.cdist(rows, centres, "sqeuclidean"), count // groups, 1)
            places = linear_sum_assignment(squares)[1]
            if labels is not None and np.array_equal(labels, places // (count // groups)):
                break
            labels = places // (count // groups)
            centres = np.stack([rows[labels == group].mean(0) for group in range(groups)])
        if (cost := squares[np.arange(count), places].sum()) < least:
            best, least = labels, cost
    return best
