"""What a run carries from step to step: arrays only."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core import files, tree


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("step", "params", "batch_stats", "opt"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class State:
    """Training state.

    Attributes:
        step: () int32, iterations done since the start of the run.
        params: {group: tree}.
        batch_stats: {group: tree} running statistics.
        opt: {group: optax state}.
    """

    step: jax.Array
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt: dict[str, Any]

    @property
    def variables(self) -> dict[str, Any]:
        """What a network's apply functions take."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def replace(self, **changes: Any) -> "State":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def fingerprint(state: State) -> str:
    """sha256 in hex over the parameters and statistics."""
    return files.fingerprint({name: leaf.addressable_data(0) for name, leaf in tree.named_leaves(
        state.variables).items()})


def fresh(variables: dict[str, Any], optimizers: dict[str, Any]) -> State:
    """The state before the first step.

    Args:
        variables: {"params": ..., "batch_stats": ...} by group.
        optimizers: {group: optax transformation} for the groups that are trained.
    """
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    return State(jnp.zeros((), jnp.int32), params, {group: stats.get(group, {}) for group in params},
                 {group: tx.init(params[group]) for group, tx in optimizers.items()})
