"""CC's channel half: input channels go whose removal changes the loss least by its second-order estimate.

Li et al., "Towards Compact CNNs via Collaborative Compression", CVPR 2021, of which the singular values, the look ahead
and the sensitivity of layers are left out. With the Hessian as the mean of squared gradients, removing weights w costs
sum (g * w)^2 (Theis et al. 2018; Molchanov et al., CVPR 2019).
"""

import numpy as np

from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("CC (channels)", "CVPR 2021", "channel", reads=("gradients",),
              leaves_out="singular values, the look ahead, budgets by sensitivity")


def scores(subject: Subject, cfg: object) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}, summed over the weights that read a channel and over parts of the images."""
    gradients = subject.gradients()
    found = {}
    for group in subject.channels():
        found[group.name] = sum(
            np.square(subject.inputs(spec, of[f"{spec.path}/kernel"]) * subject.inputs(spec)).sum(1)
            for spec in group.readers for of in gradients)
    return found
