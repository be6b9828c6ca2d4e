"""HRank's scores: channels whose feature maps have a low rank go.

Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020. The original prunes layer by layer, trains
between, and sets a rate for each layer by hand; here all layers are pruned at once, by one rate.
"""

import numpy as np

from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("HRank", "CVPR 2020", "filter", reads=("features",),
              leaves_out="the layer-wise schedule and the rates set by hand")


def scores(subject: Subject, cfg: object) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}, the mean rank of a channel's feature maps behind its norm and ReLU."""
    of = {group.name: group.writers[0].norm or group.name for group in subject.channels()}
    features = subject.features(tuple(of.values()))
    found = {}
    for name, path in of.items():
        maps = np.maximum(np.asarray(features[path], np.float32), 0)
        maps = maps.reshape(len(maps), *maps.shape[1:-1], maps.shape[-1]) if maps.ndim == 4 else maps[:, None, None]
        found[name] = np.linalg.matrix_rank(np.moveaxis(maps, -1, 1)).mean(0)
    return found
