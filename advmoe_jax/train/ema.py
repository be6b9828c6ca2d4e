"""An exponential moving average of the weights, which is evaluated beside them.

After t steps the average keeps min(decay, (1 + t) / (10 + t)) of itself, so that it does not remember the start. What
is no real number, such as indices among the statistics, is not averaged but taken as it is.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from advmoe_jax.train.state import State

NAME = "ema"  # of the average in State.extra, and of the checkpoint that evaluations know


def begin(state: State) -> State:
    """A state whose average is its own variables."""
    return state.replace(extra=state.extra | {NAME: jax.tree.map(jnp.copy, state.variables)})


def update(decay: float) -> Callable[[State], State]:
    """state -> the state with its variables in the average; for `System.every`, after each step. A state is donated."""
    def run(state):
        kept = jnp.minimum(decay, (1 + state.step) / (10 + state.step))

        def mean(old, new):
            return (kept * old + (1 - kept) * new).astype(old.dtype) if jnp.issubdtype(old.dtype, jnp.inexact) else new

        average = jax.tree.map(mean, state.extra[NAME], state.variables)
        return state.replace(extra=state.extra | {NAME: average})

    return jax.jit(run, donate_argnums=0)
