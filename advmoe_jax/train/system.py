"""What a system is to the loop: a state, stages of steps, and views on the trained model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from advmoe_jax.train.state import State

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Step:
    """One update of an iteration.

    Attributes:
        name: "lower", "upper".
        run: (state, batch) -> (state, batch, metrics), by compiled programs; the state is donated. A later step of the
            iteration that has the same stream gets the batch that comes back.
        stream: its batches are a function of (seed, stream, step); two steps may share one.
        owns: the parameter groups it changes; all others stay bit-identical.
        tensors: names that the metric "non_finite" indexes.
        every: it runs in iterations 0, every, 2 * every, ...
    """

    name: str
    run: Callable[[State, Batch], tuple[State, Batch, dict[str, jax.Array]]]
    stream: str
    owns: tuple[str, ...]
    tensors: tuple[str, ...]
    every: int = 1


@dataclasses.dataclass(frozen=True)
class Stage:
    """A phase of training.

    Attributes:
        name: for logs and checkpoints.
        length: iterations; each runs every step once, or those whose turn it is.
        indices: the training images it draws from.
        steps: in order.
    """

    name: str
    length: int
    indices: np.ndarray
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class System:
    """A way to train a model.

    Attributes:
        init: key -> state.
        stages: in order.
        outputs_fn: (state, view) -> Partial x -> (logits, aux).
        views: gradients through which an honest evaluation attacks; one for a dense network. The values of all
            views are the same.
        network: the model.
        describe: one line for the log and the report.
        routed_fn: state -> Partial (x, route) -> (logits, aux), of a routed model.
    """

    init: Callable[[jax.Array], State]
    stages: tuple[Stage, ...]
    outputs_fn: Callable[[State, str], jax.tree_util.Partial]
    views: tuple[str, ...]
    network: Any
    describe: str
    routed_fn: Callable[[State], jax.tree_util.Partial] | None = None
