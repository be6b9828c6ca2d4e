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


def first_difference(ours: PyTree, theirs: PyTree) -> tuple[str, Any, Any] | None:
    """The first leaf, by name, whose shape two trees do not share: its name, our shape and theirs, "nothing" where a
    tree has no such leaf. None if they share all."""
    ours, theirs = ({name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()} for tree in (ours, theirs))
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if shapes[0] != shapes[1]:
            return name, *shapes
    return None


def size(tree: PyTree) -> int:
    """Number of scalars in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
