"""What is asked of pytrees: paths of leaves as text, sizes, whether they are known yet."""

from typing import Any

import jax

PyTree = Any


def path_name(path: tuple) -> str:
    """A jax key path as "backbone/conv1/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{"a/b/c": leaf} in the order of `jax.tree.leaves`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_traced(tree: PyTree) -> bool:
    """Whether a pytree holds values that are not known yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def size(tree: PyTree) -> int:
    """Number of scalars in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
