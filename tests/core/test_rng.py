"""Keys are functions of seed, stream and step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError


def _data(keys):
    return np.asarray(jax.random.key_data(keys))


def test_a_stream_has_one_number_by_any_name():
    """And none of the numbers of today changes: results would."""
    assert rng.number("attack") == 0x47C02D3B and rng.number("augment") == 0x6B167A19
    assert rng.number("attack").dtype == np.int32
    chex.assert_trees_all_equal(_data(rng.key(3, "attack", 5)), np.array([853832734, 189774109], np.uint32))
    chex.assert_trees_all_equal(_data(rng.key(3, "attack", 5)), _data(rng.key(3, rng.number("attack"), 5)))


def test_keys_of_other_seeds_streams_and_steps_differ():
    keys = [rng.key(seed, name, step) for seed in (0, 1) for name in ("attack", "augment") for step in (0, 1, 2)]
    assert len({tuple(_data(key)) for key in keys}) == len(keys)


def test_a_key_is_the_same_inside_jit():
    traced = jax.jit(lambda seed, step: jax.random.key_data(rng.key(seed, "attack", step)))(3, 5)
    chex.assert_trees_all_equal(np.asarray(traced), _data(rng.key(3, "attack", 5)))


def test_a_key_per_example_does_not_depend_on_the_batch():
    key = rng.key(0, "attack")
    keys = _data(rng.per_example(key, jnp.array([4, 0, 7])))
    for row, index in enumerate((4, 0, 7)):
        chex.assert_trees_all_equal(keys[row], _data(jax.random.fold_in(key, index)))


def test_rowwise_and_fold_in():
    key = rng.key(0, "attack")
    keys = rng.rowwise(key, 3)
    chex.assert_trees_all_equal(_data(keys), _data(rng.per_example(key, jnp.arange(3))))
    chex.assert_trees_all_equal(_data(rng.rowwise(keys, 3)), _data(keys))
    legacy = jax.random.key_data(key)
    chex.assert_trees_all_equal(_data(rng.rowwise(legacy, 3)), _data(keys))
    chex.assert_trees_all_equal(_data(rng.rowwise(jax.random.key_data(keys), 3)), _data(keys))
    chex.assert_trees_all_equal(_data(rng.fold_in(keys, 9))[1], _data(jax.random.fold_in(keys[1], 9)))


@pytest.mark.parametrize("key, words", [
    (0, "key is 0: expected jax.random.key"), (np.zeros(2), "expected jax.random.key"),
    (np.zeros(3, np.uint32), "expected jax.random.key"), (jax.random.split(jax.random.key(0)), "one for each of the 3"),
    (jax.random.split(jax.random.PRNGKey(0)), "one for each of the 3")])
def test_what_is_no_key(key, words):
    with pytest.raises(UserError, match=words):
        rng.rowwise(key, 3)
