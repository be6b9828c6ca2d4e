"""What a run carries from step to step: arrays only."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from advmoe_jax.core import tree as trees
from advmoe_jax.ops import masks as masking


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "batch_stats", "opt", "masks", "extra"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class State:
    """Training state.

    Attributes:
        step: () int32, iterations done since the start of the run; the loop counts them.
        params: {group: tree}.
        batch_stats: {group: tree} running statistics.
        opt: {group: optax state}.
        masks: {group: tree like params, None where dense} of groups that have any; what they remove stays removed.
        extra: {name: arrays} that a system owns.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt: dict[str, Any]
    masks: dict[str, Any] = dataclasses.field(default_factory=dict)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What a model's functions take."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def replace(self, **changes: Any) -> "State":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


class Trained(NamedTuple):
    """What of a state is the model.

    Attributes:
        variables: {"params": {group: tree}, "batch_stats": {group: tree}}.
        masks: {group: tree}, as of State.
    """

    variables: dict[str, Any]
    masks: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """What of a state optimizers change, and its gradients are of.

    Attributes:
        get: state -> {group: tree}.
        put: (state, {group: tree} of some groups) -> the state with these in it.
    """

    get: Callable[[State], dict[str, Any]]
    put: Callable[[State, dict[str, Any]], State]


PARAMETERS = Part(lambda state: state.params, lambda state, trees: state.replace(params={**state.params, **trees}))


def fresh(variables: dict[str, Any], optimizers: dict[str, Any], masks: dict[str, Any] | None = None,
          extra: dict[str, Any] | None = None, *, begin: Callable[[State], State] = lambda state: state,
          part: Part = PARAMETERS) -> State:
    """The state before the first step.

    Args:
        variables: {"params": ..., "batch_stats": ...} by group.
        optimizers: {group: optax transformation} for the groups that are trained.
        masks, extra: as of State; parameters are masked at once.
        begin: adds what a system makes of the state itself; its optimizers begin after that.
        part: what they change.
    """
    masks = masks or {}
    masking.check(variables["params"], masks)
    params = {group: masking.apply(tree, masks[group]) if group in masks else tree
              for group, tree in variables["params"].items()}
    stats = variables.get("batch_stats", {})
    state = begin(State(jnp.zeros((), jnp.int32), params, {group: stats.get(group, {}) for group in params}, {}, masks,
                        extra or {}))
    return state.replace(opt={group: tx.init(part.get(state)[group]) for group, tx in optimizers.items()})


def parameters(state: State, paths: Iterable[str]) -> dict[str, jax.Array]:
    """{path: parameter} of some paths, "backbone/conv1/kernel"."""
    leaves = trees.named_leaves(state.params)
    return {path: leaves[path] for path in paths}


def with_masks(state: State, masks: Mapping[str, jax.Array]) -> State:
    """The state with these masks alone, {path of a parameter: mask}, which are not applied yet."""
    found = masking.of_leaves(state.params, masks)
    return state.replace(masks={group: part for group, part in found.items() if jax.tree.leaves(part)})


def masked(state: State) -> State:
    """The state with zeros where its masks have them: a step's `after`, which lets nothing come back."""
    if not state.masks:
        return state
    return state.replace(params=state.params | {
        group: masking.apply(state.params[group], masks) for group, masks in state.masks.items()})
