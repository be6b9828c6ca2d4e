"""Pruning: scores, selection, masks. A method is one file with ABOUT and `scores` or `masks`."""

from advmoe_jax.pruning import admm, masks, srgkp
from advmoe_jax.pruning.pruned import Pruned, prune

__all__ = ["Pruned", "admm", "masks", "prune", "srgkp"]
