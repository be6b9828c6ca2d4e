"""What models of several networks share, each of which is a parameter group."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.models.macs import LayerCost


def of_group(variables: dict[str, Any], group: str) -> dict[str, Any]:
    """The variables of one network, {"params": tree, "batch_stats": tree}."""
    return {part: trees[group] for part, trees in variables.items()}


def stacked(members: Sequence[Any]) -> Any:
    """Trees of one shape as one with leading M: networks of one architecture are one program, run M times."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def layers_within(group: str, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers of a network as those of the whole model, whose paths begin with the group."""
    return tuple(dataclasses.replace(spec, path=f"{group}/{spec.path}", norm=spec.norm and f"{group}/{spec.norm}",
                                     inputs=tuple(f"{group}/{path}" for path in spec.inputs)) for spec in layers)


def costs_within(group: str, costs: Sequence[LayerCost]) -> tuple[LayerCost, ...]:
    """The same of what the layers of a network cost."""
    return tuple(dataclasses.replace(cost, path=f"{group}/{cost.path}") for cost in costs)
