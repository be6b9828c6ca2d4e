"""LRF's scores: filters that the others of their layer can replace linearly go, one after the other.

Joo et al., "Linearly Replaceable Filters for Deep Network Channel Pruning", AAAI 2021. The original puts 1x1
convolutions around each layer, moves what is lost into them and distils layer by layer; of it only the score is here.
"""

import numpy as np

from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("LRF (score)", "AAAI 2021", "channel",
              leaves_out="1x1 convolutions, compensation, distillation layer by layer")
_RIDGE = 1e-9  # of the mean square of filters: more filters than weights depend on each other


def scores(subject: Subject, cfg: object) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}, the turn in which a filter would be removed."""
    return {group.name: _turns(np.concatenate(subject.filters(group.writers[0]), 1)) for group in subject.channels()}


def _turns(rows: np.ndarray) -> np.ndarray:
    """(w,) of (w, D): the filter of the least residual by the others has 0; it is left out, and so on."""
    gram = rows @ rows.T
    gram += _RIDGE * max(np.trace(gram) / len(gram), np.finfo(float).tiny) * np.eye(len(gram))
    turns, left = np.zeros(len(rows)), list(range(len(rows)))
    for turn in range(len(rows)):
        residuals = 1 / np.diag(np.linalg.inv(gram[np.ix_(left, left)]))  # squared, of least squares by the others
        turns[left.pop(int(residuals.argmin()))] = turn
    return turns
