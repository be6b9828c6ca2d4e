"""Adversarial weight perturbation: a step takes its gradient where the weights are worse, and moves the weights by it.

Wu, Xia & Wang, NeurIPS 2020, algorithm 1, with one step of the weights, as the authors' code takes. A kernel w becomes
w + gamma |w| g / |g|, g the gradient of the step's own loss on the whole batch, |.| the Euclidean norm of the kernel:
that of a mixture holds all experts of its layer. Biases and norms, which have one dimension, stay, and so do groups
that the step does not own and what masks remove.

Loss, metrics, gradients and the running statistics that are kept are those at the perturbed weights. What the pass that
finds g does to the statistics is forgotten, as in the authors' code, where a copy of the network makes it. The weights
themselves never move but by the optimizer: nothing is added that would be subtracted again, and weight decay is of
them. The authors' code decays the perturbed ones; the difference is rate * decay * gamma |w| g / |g|.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.ops import masks as masking
from advmoe_jax.train.state import State

_LEAST_NORM = 1e-20  # of a gradient: a kernel without one stays

Perturbation = Callable[[State, dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]
"""(state, {group: parameters}, () -> {group: their gradients}) -> {group: perturbed parameters}."""


def make(gamma: float, first: int = 0) -> Perturbation:
    """What moves the weights of a step.

    Args:
        gamma: size of a kernel's perturbation in shares of its norm, above 0; .005 and .01 in the paper.
        first: iteration from which on they are moved; before it no gradient is computed for that.
    """
    def run(state, weights, gradients):
        def moved():
            slopes = {group: masking.apply(of, state.masks[group]) if group in state.masks else of
                      for group, of in gradients().items()}
            return jax.tree.map(lambda leaf, slope: _moved(leaf, slope, gamma), weights, slopes)

        return jax.lax.cond(state.step >= first, moved, lambda: weights) if first else moved()

    return run


def _moved(leaf: jax.Array, slope: jax.Array, gamma: float) -> jax.Array:
    if leaf.ndim < 2:
        return leaf
    size = gamma * jnp.linalg.norm(leaf.ravel()) / jnp.maximum(jnp.linalg.norm(slope.ravel()), _LEAST_NORM)
    return (leaf + size * slope).astype(leaf.dtype)
