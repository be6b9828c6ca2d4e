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


def layers_within(prefix: str, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The layers of a part as those of the whole model, whose paths begin with the prefix, "member0/"."""
    return tuple(dataclasses.replace(spec, path=f"{prefix}{spec.path}", norm=spec.norm and f"{prefix}{spec.norm}",
                                     inputs=tuple(f"{prefix}{path}" for path in spec.inputs)) for spec in layers)


def costs_within(prefix: str, costs: Sequence[LayerCost]) -> tuple[LayerCost, ...]:
    """The same of what the layers of a part cost."""
    return tuple(dataclasses.replace(cost, path=f"{prefix}{cost.path}") for cost in costs)
