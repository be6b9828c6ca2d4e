"""FPGM: filters near the geometric median of their layer go, since the others can stand for them.

He et al., "Filter Pruning via Geometric Median for Deep Neural Networks Acceleration", CVPR 2019. The filters are
chosen again after every epoch; until then those that are zero rest. The original also takes the last layers of blocks,
whose channels stay in the sum of the shortcut; here whole channels inside blocks go.
"""

import numpy as np
from scipy.spatial import distance

from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("FPGM", "CVPR 2019", "filter", when="hard", leaves_out="filters whose channels a shortcut adds to")


def scores(subject: Subject, cfg: object) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}, the sum of a filter's distances to the others of its layer."""
    return {group.name: sum(distance.cdist(rows, rows).sum(1) for rows in subject.filters(group.writers[0]))
            for group in subject.channels()}
