"""What is asked of pytrees."""

import numpy as np
import pytest

from advmoe_jax.core import tree

TREE = {"b": {"x": np.zeros((2, 3))}, "a": np.zeros(4)}


def test_trees_of_one_architecture():
    assert tree.first_difference(TREE, {"a": np.ones(4), "b": {"x": np.ones((2, 3))}}) is None


@pytest.mark.parametrize("theirs, expected", [
    ({"a": np.zeros(4), "b": {"x": np.zeros((3, 2))}}, ("b/x", (2, 3), (3, 2))),
    ({"a": np.zeros(5), "b": {"x": np.zeros(1)}}, ("a", (4,), (5,))),
    ({"a": np.zeros(4)}, ("b/x", (2, 3), "nothing")),
    (TREE | {"aa": np.zeros(1)}, ("aa", "nothing", (1,)))])
def test_the_first_difference_by_name(theirs, expected):
    assert tree.first_difference(TREE, theirs) == expected
