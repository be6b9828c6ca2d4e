"""Masks: pytrees like the parameters with None where a leaf is dense. 1 keeps an entry, 0 removes it."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import UserError, unknown_name
from advmoe_jax.core.layer_spec import LayerSpec

PyTree = Any


def map_masked(function, params: PyTree, masks: PyTree) -> PyTree:
    """`params` with `function(leaf, mask)` in place of the leaves that have a mask.

    Args:
        function: of a leaf and its mask.
        params: a tree.
        masks: the same tree with None, at a leaf or above several, where they are dense.
    """
    def at(mask, part):
        return part if mask is None else function(part, mask)

    return jax.tree.map(at, masks, params, is_leaf=lambda leaf: leaf is None)


def check(params: PyTree, masks: PyTree) -> None:
    """Raises UserError for masks {group: tree} that are of another tree than the parameters, or do not broadcast."""
    for group, part in masks.items():
        if group not in params:
            raise unknown_name("group of masks", group, params)
        try:
            map_masked(_check_leaf, params[group], part)
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"masks of {group} do not fit its parameters: {reason}; expected the same tree, None where "
                            "dense") from None


def _check_leaf(leaf, mask):
    shape, own = np.shape(leaf), np.shape(mask)
    if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(reversed(own), reversed(shape))):
        raise ValueError(f"a mask of shape {own} for an array of {shape}")
    return leaf


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """Parameters with exact zeros where the mask, which broadcasts to its leaf, is zero; NaN is removed too."""
    return map_masked(lambda leaf, mask: jnp.where(jnp.asarray(mask) != 0, leaf, jnp.zeros_like(leaf)), params, masks)


def of_leaves(params: PyTree, masks: Mapping[str, Any]) -> PyTree:
    """Masks like `params`, None where dense, of masks by the path of their leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: masks.get(trees.path_name(path)), params)


def joined(masks: PyTree, others: PyTree) -> PyTree:
    """Masks of equal trees, None where dense, that remove what either removes."""
    def both(mask, other):
        return mask if other is None else other if mask is None else np.asarray(mask, bool) & np.asarray(other, bool)

    return jax.tree.map(both, masks, others, is_leaf=lambda leaf: leaf is None)


def kept_channels(mask: jax.Array, ndim: int) -> jax.Array:
    """(O,) bool, output channels of which any entry is kept, of a mask that broadcasts to a kernel of `ndim` axes."""
    full = jnp.reshape(mask, (1,) * (ndim - jnp.ndim(mask)) + jnp.shape(mask))
    return jnp.any(full != 0, tuple(range(ndim - 1)))


def cover_norms(masks: PyTree, params: PyTree, layers: Iterable[LayerSpec]) -> PyTree:
    """Masks that remove the scale and bias of a norm too where all of a channel before it is removed.

    A channel of zeros still gives the bias of the norm behind it. A layer's own bias is covered in the same way. A
    channel of the norm behind a routed layer serves one of each expert, and goes if it is gone in all; where experts
    overlap it stays.

    Args:
        masks: {group: tree}, None where dense; groups without any may be left out.
        params: {group: tree} or shapes of them.
        layers: of the network, whose paths begin with the group.
    """
    covered = jax.tree.map(
        lambda mask, part: jax.tree.map(lambda _: None, part) if mask is None else mask,
        {group: (masks or {}).get(group) for group in params}, dict(params), is_leaf=lambda leaf: leaf is None)
    for spec in layers:
        place = _at(covered, spec.path)
        mask = place.get("kernel") if place else None
        if mask is None or spec.kernel[-1] % spec.width:
            continue
        kept = kept_channels(mask, len(spec.kernel))
        kept = jnp.broadcast_to(kept, spec.kernel[-1:]).reshape(-1, spec.width).any(0)
        for path in filter(None, (spec.path, spec.norm)):
            node = _at(covered, path)
            for name in ("scale", "bias"):
                if name in node:
                    own = node[name]
                    node[name] = kept.astype(jnp.asarray(mask).dtype) if own is None else own * kept.astype(own.dtype)
    return covered


def _at(tree: PyTree, path: str) -> Any:
    for name in path.split("/"):
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree
