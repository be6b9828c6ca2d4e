"""Plans hold every image once, in a block of its expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.ops import plans

LOADS = {"even": lambda b, e: np.arange(b) % e, "one": lambda b, e: np.full(b, e - 1),
         "random": lambda b, e: np.random.default_rng(b).integers(0, e, b),
         "uneven": lambda b, e: np.where(np.arange(b) % 10 == 3, e - 1, 0)}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("batch, num_experts", [(1, 2), (13, 2), (32, 3), (8, 16), (40, 1)])
def test_no_image_is_left_out(batch, num_experts, size, load):
    ids = LOADS[load](batch, num_experts)
    plan = plans.make(jnp.asarray(ids, jnp.int32), num_experts, size)
    image, place, expert, ends = map(np.asarray, plan)
    assert image.shape == ((batch + num_experts * (size - 1)) // size, size)
    np.testing.assert_array_equal(image.ravel()[place], np.arange(batch))
    assert np.sum(image < batch) == batch, "and each once"
    np.testing.assert_array_equal(expert[place // size], ids)
    np.testing.assert_array_equal(plan.used, (image < batch).any(1))
    assert ends[-1] == plan.used.sum() == sum(-(-np.sum(ids == e) // size) for e in range(num_experts))
    for e in range(num_experts):
        np.testing.assert_array_equal(expert[ends[e - 1] if e else 0:ends[e]], e)


def test_images_of_an_expert_keep_their_order():
    plan = plans.make(jnp.asarray([1, 0, 1, 1, 0], jnp.int32), 2, 2)
    np.testing.assert_array_equal(plan.image, [[1, 4], [0, 2], [3, 5]])


@pytest.mark.parametrize("load", LOADS)
def test_many_are_planned_as_few_are(load, monkeypatch):
    """Each with each is not compared where there are as many as the tokens of a batch."""
    ids = jnp.asarray(LOADS[load](60, 3), jnp.int32)
    few = plans.make(ids, 3, 8)
    monkeypatch.setattr(plans, "_FEW", 8)
    for ours, theirs in zip(plans.make.__wrapped__(ids, 3, 8), few):
        np.testing.assert_array_equal(ours, theirs)


def test_one_plan_for_every_load():
    """The same compiled program, whatever the load."""
    before = plans.make._cache_size()
    for load in LOADS.values():
        plans.make(jnp.asarray(load(24, 3), jnp.int32), 3, 5)
    assert plans.make._cache_size() == before + 1
    assert jax.tree.structure(plans.make(jnp.zeros(24, jnp.int32), 3, 5)).num_leaves == 4
