"""The arithmetic of masks on trees."""

import chex
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.ops import masks

PARAMS = {"a": {"kernel": jnp.arange(1., 7.).reshape(2, 3), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((3, 2))},
          "bn": {"scale": jnp.full(3, 2.), "bias": jnp.ones(3)}}


def test_what_is_masked_is_zero_and_the_rest_as_it_was():
    mask = {"a": {"kernel": jnp.array([[1., 0., 1.], [0., 1., 1.]]), "bias": None}, "b": None, "bn": None}
    chex.assert_trees_all_equal(masks.apply(PARAMS, mask), PARAMS | {
        "a": {"kernel": jnp.array([[1., 0., 3.], [0., 5., 6.]]), "bias": jnp.ones(3)}})


def test_a_mask_of_channels_broadcasts_and_removes_nan():
    params = PARAMS | {"a": PARAMS["a"] | {"kernel": PARAMS["a"]["kernel"].at[0, 1].set(jnp.nan)}}
    mask = {"a": {"kernel": jnp.array([True, False, True]), "bias": None}, "b": None, "bn": None}
    np.testing.assert_array_equal(masks.apply(params, mask)["a"]["kernel"], [[1, 0, 3], [4, 0, 6]])


def test_a_removed_channel_loses_its_bias_and_its_norm():
    """A channel of which anything is kept does not."""
    layer = LayerSpec("a", (2, 3), 3, 1, (1, 1), "bn", ())
    kernel = jnp.array([[1., 0., 0.], [0., 1., 0.]])  # of the last channel nothing is kept
    mask = {"a": {"kernel": kernel, "bias": None}, "b": None, "bn": None}
    covered = masks.cover_norms(mask, PARAMS, (layer,))
    gone = jnp.array([1., 1., 0.])
    chex.assert_trees_all_equal(covered, {"a": {"kernel": kernel, "bias": gone}, "b": {"kernel": None},
                                          "bn": {"scale": gone, "bias": gone}})
    out = masks.apply(PARAMS, covered)
    x = jnp.array([2., -1.])
    y = (x @ out["a"]["kernel"] + out["a"]["bias"]) * out["bn"]["scale"] + out["bn"]["bias"]
    assert y[2] == 0 and np.all(y[:2] != 0)


def test_dense_is_dense():
    chex.assert_trees_all_equal(masks.apply(PARAMS, {"a": None, "b": None, "bn": None}), PARAMS)
