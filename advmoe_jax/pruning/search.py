"""Scores that are trained while the weights rest, and the masks of the largest: HYDRA, and HARP's shares of layers.

Sehwag et al., "HYDRA", NeurIPS 2020; Zhao & Wressnegger, "Holistic adversarially robust pruning", ICLR 2023. Trees are
{group: tree like its parameters, None where nothing is}.
"""

import dataclasses
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core import tree
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.ops import masks as masking
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning import streams

_LEAST_START = 0.1  # the least share that HARP's search begins at
_HALVINGS, _FAR = 40, 32.0  # of the interval in which a shift of the rates is sought


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched for.

    Attributes:
        layers: all of the network.
        searched: those that lose weights.
        keep: share of their weights that stays.
        unit, scope: as `masks.select`; where rates are learned, scope is "layer" and the unit not "grouped".
        learns_rates: whether each layer learns its own share.
        is_coupled: of unit "filter", whether layers whose outputs are added lose the same filters, all with the weights
            that read them, see `streams`; no rates are learned then.
    """

    layers: tuple[LayerSpec, ...]
    searched: tuple[LayerSpec, ...]
    keep: Fraction
    unit: str = "weight"
    scope: str = "layer"
    learns_rates: bool = False
    is_coupled: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """{path of a kernel: number of its weights}."""
        return {f"{spec.path}/kernel": math.prod(spec.kernel) for spec in self.searched}


def scaled(score: jax.Array) -> jax.Array:
    """(..., I, O) scores of a layer with sqrt(6 / fan-in) as the largest size, as HYDRA begins; zeros stay zeros."""
    largest = jnp.max(jnp.abs(score))
    return math.sqrt(6 / math.prod(score.shape[:-1])) * score / jnp.where(largest > 0, largest, 1)


def begin(params: Any, search: Search, scores: Any = None) -> dict[str, Any]:
    """What a search begins with: the dense parameters; scores, unless given the scaled weights with their signs; and
    rates.

    HARP begins with twice the share that is to stay, and with a tenth at least.

    Args:
        params: {group: tree}, dense.
        search: of these.
        scores: {path of a kernel: array like it}, signed; None: the weights themselves (`pruning.erm`).
    Returns:
        {"dense": like params, "scores": tree of arrays like the kernels, "rates": tree of (), if they are learned}.
    """
    leaves = tree.named_leaves(params)
    scores = {path: scaled(leaves[path]) for path in search.sizes} if scores is None else scores
    found = {"dense": jax.tree.map(jnp.copy, params),
             "scores": masking.of_leaves(params, {path: scores[path] for path in search.sizes})}
    if search.learns_rates:
        start = selecting.inverse_rate(max(_LEAST_START, 2 * float(search.keep)), float(search.keep))
        found["rates"] = masking.of_leaves(params, {path: jnp.float32(start) for path in search.sizes})
    return found


def soft_masks(state: Mapping[str, Any], search: Search) -> Any:
    """Masks of the largest scores as numbers, with gradients of scores and rates; norms behind whole channels too.

    Args:
        state: as `begin` gives it.
        search: as there.
    """
    scores = {path: jnp.abs(score) for path, score in tree.named_leaves(state["scores"]).items()}
    keep = {path: selecting.rate(q, float(search.keep)) for path, q in tree.named_leaves(state["rates"]).items()
            } if search.learns_rates else search.keep
    found = _of_streams(scores, search) if search.is_coupled else selecting.select_through(
        scores, keep, unit=search.unit, scope=search.scope)
    return masking.cover_norms(masking.of_leaves(state["dense"], found), state["dense"], search.layers)


def _of_streams(scores, search):
    """{path of a kernel: mask} of the channels of the largest scores, those of all the filters that write one added."""
    written = streams.streams(search.layers, {spec.path for spec in search.searched})
    sums = {name: sum(jnp.sum(scores[f"{path}/kernel"], (0, 1, 2)) for path in paths)[None]
            for name, paths in written.items()}
    chosen = selecting.select_through(sums, search.keep, scope=search.scope)
    kept = {path: chosen[name][0] for name, paths in written.items() for path in paths}
    return {f"{path}/kernel": mask for path, mask in streams.spanning(search.layers, kept).items()}


def kept(state: Mapping[str, Any], search: Search) -> jax.Array:
    """() share of the weights that the rates keep, with gradients: HARP's soft count."""
    return _kept(tree.named_leaves(state["rates"]), search)


def budget_loss(state: Mapping[str, Any], search: Search) -> jax.Array:
    """() `masks.budget_loss` of the rates."""
    return selecting.budget_loss(tree.named_leaves(state["rates"]), search.sizes, float(search.keep))


def within_budget(state: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """The same with all rates moved down alike, as little as the budget needs: not at all where it is met."""
    rates = tree.named_leaves(state["rates"])

    def narrower(_, ends):
        low, high = ends
        middle = (low + high) / 2
        fits = _kept({path: q - middle for path, q in rates.items()}, search) <= float(search.keep)
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    met = _kept(rates, search) <= float(search.keep)
    _, far_enough = jax.lax.fori_loop(0, _HALVINGS, narrower, (jnp.float32(0), jnp.float32(_FAR)))
    shift = jnp.where(met, 0, far_enough)
    return {**state, "rates": jax.tree.map(lambda q: q - shift, state["rates"])}


def _kept(rates, search):
    total = sum(search.sizes.values())
    return sum(selecting.rate(q, float(search.keep)) * (search.sizes[path] / total) for path, q in rates.items())
