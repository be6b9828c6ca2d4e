"""How much of each array masks keep: what counters of parameters and multiply-accumulates share."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from advmoe_jax.core import tree


def shares(shapes: Mapping[str, tuple[int, ...]], masks: Any) -> dict[str, Fraction]:
    """{name: share of the entries that are kept} of the arrays that have a mask.

    Args:
        shapes: {"backbone/conv1/kernel": (3, 3, 3, 64)} of all arrays.
        masks: {group: tree} as `State.masks`, which broadcast to the arrays; None: there is none.
    """
    return {name: Fraction(int(np.count_nonzero(np.broadcast_to(mask, shapes[name]))), int(np.prod(shapes[name])))
            for name, mask in tree.named_leaves(masks or {}).items()}


def kept(shapes: Mapping[str, tuple[int, ...]], masks: Any) -> int:
    """The number of entries of all arrays that are kept. Arguments as `shares`."""
    found = shares(shapes, masks)
    return int(sum(int(np.prod(shape)) * found.get(name, 1) for name, shape in shapes.items()))
