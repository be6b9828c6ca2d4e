"""What a system is to the loop: a state, the steps of an iteration, and the model that it trains."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from advmoe_jax.models.model import Model
from advmoe_jax.train.state import State

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a step is fed. Steps of an iteration with equal inputs get the same arrays, made once.

    Attributes:
        batch: random stream of the batch.
        crops: of its augmentation.
        noise: of its attack.
    """

    batch: str
    crops: str
    noise: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One update of an iteration.

    Attributes:
        name: "lower", "upper".
        inputs: what it is fed.
        prepare: (state, batch, inputs) -> the batch, cropped and attacked.
        update: (state, prepared batch) -> (state, metrics), a compiled program; the state is donated. It does not count
            iterations.
        owns: the parameter groups it changes; all others stay bit-identical.
        tensors: names that the metric "non_finite" indexes.
        every: it runs in iterations 0, every, 2 * every, ...
    """

    name: str
    inputs: Inputs
    prepare: Callable[[State, Batch, Inputs], Batch]
    update: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    owns: tuple[str, ...]
    tensors: tuple[str, ...]
    every: int = 1


@dataclasses.dataclass(frozen=True)
class System:
    """A way to train a model.

    Attributes:
        init: key -> state, with masks if it prunes: `train.state.fresh(variables, optimizers, masks)`, {group: a tree
            like its parameters, None where dense}. What they remove stays removed; nothing else is to be done.
        steps: of an iteration, in order.
        length: iterations.
        rows: the training images that it draws from.
        model: what is trained.
        describe: one line for the log and the report.
        every: {length as text, "1 epochs": state -> state}, after each so many iterations: a projection, a schedule of
            masks.
        first_best: the iteration from which on a checkpoint may be the best one, when masks are chosen later.
        files: {name: JSON} that the run leaves in its workdir before its first step.
    """

    init: Callable[[jax.Array], State]
    steps: tuple[Step, ...]
    length: int
    rows: np.ndarray
    model: Model
    describe: str
    every: Mapping[str, Callable[[State], State]] = dataclasses.field(default_factory=dict)
    first_best: int = 0
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def also(self, length: str, change: Callable[[State], State]) -> "System":
        """The same that changes its state after each such length too, before whatever it does then already."""
        others = dict(self.every)
        other = others.pop(length, None)
        both = change if other is None else lambda state: other(change(state))
        return dataclasses.replace(self, every={length: both, **others})

    def visits(self, first: int) -> list[tuple[int, str]]:
        """(iteration, random stream) of every batch that it is fed from iteration `first` on, in order."""
        return [(step, stream) for step in range(first, self.length) for stream in dict.fromkeys(
            update.inputs.batch for update in self.steps if step % update.every == 0)]
