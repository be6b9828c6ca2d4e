"""The arithmetic of masks on trees."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.models import network
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


def test_what_is_mapped_has_a_mask():
    """None above several leaves leaves all of them; 0 and 1 of any type are masks."""
    seen = []

    def noting(leaf, mask):
        seen.append(np.shape(mask))
        return -leaf

    mask = {"a": None, "b": {"kernel": np.ones((3, 2), bool)}, "bn": {"scale": None, "bias": np.ones(3)}}
    found = masks.map_masked(noting, PARAMS, mask)
    assert seen == [(3, 2), (3,)]
    chex.assert_trees_all_equal(found, PARAMS | {
        "b": {"kernel": -PARAMS["b"]["kernel"]}, "bn": PARAMS["bn"] | {"bias": -PARAMS["bn"]["bias"]}})
    chex.assert_trees_all_equal(masks.map_masked(noting, PARAMS, None), PARAMS)
    assert len(seen) == 2


def test_zeros_are_exact():
    """Not -0, whose sign a division brings back, and not what a product leaves of inf."""
    leaf = jnp.array([-1., jnp.inf, -jnp.inf, jnp.nan, -0.5])
    found = np.asarray(masks.apply({"w": leaf}, {"w": jnp.array([0, 0, 0, 0, 1], jnp.int8)})["w"])
    assert found[:4].tobytes() == np.zeros(4, np.float32).tobytes() and found[4] == -0.5


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)])
def test_kept_channels(shape):
    """Of a mask that says less than its kernel has; the last axis is that of the channels."""
    mask = np.broadcast_to(np.array([1., 0., 1.]), shape)
    assert masks.kept_channels(mask, 2).tolist() == [True, False, True]
    if len(shape) == 2 and shape[0] == 2:
        assert masks.kept_channels(mask * [[0.], [1.]], 2).tolist() == [True, False, True]
        assert masks.kept_channels(mask * 0, 2).tolist() == [False] * 3


def test_masks_that_a_norm_has_already_stay():
    """What either removes is removed."""
    layer = LayerSpec("a", (2, 3), 3, 1, (1, 1), "bn", ())
    mask = {"a": {"kernel": jnp.array([1., 1., 0.]), "bias": None}, "b": None,
            "bn": {"scale": jnp.array([0., 1., 1.]), "bias": None}}
    covered = masks.cover_norms(mask, PARAMS, (layer,))
    assert covered["bn"]["scale"].tolist() == [0, 1, 0] and covered["bn"]["bias"].tolist() == [1, 1, 0]
    assert mask["bn"]["bias"] is None and mask["a"]["bias"] is None, "what was given is as it was"


def _network(num_experts):
    config = configs.default(system="standard")
    configs.override_all(config, ["model.depth=4", "model.width=8", f"model.num_experts={num_experts}"])
    net = network.make(config.model, (8, 8, 1), 4)
    return net, jax.device_get(jax.jit(net.init)(jax.random.key(0)))


def _covered(net, params, of):
    """{name: mask} of all norms and biases, where the convolutions that `of` names lose their first and last channel,
    and but for one entry the second."""
    def mask(name, leaf):
        if name.removesuffix("/kernel") not in of:
            return None
        kept = np.ones(leaf.shape, np.float32)
        kept[..., [0, -1]] = 0
        kept[1:, ..., 1], kept[:1, 1:, ..., 1], kept[0, 0, 1:, 1] = 0, 0, 0
        assert kept[..., 1].sum() == 1
        return kept

    names = iter(tree.named_leaves(params["backbone"]))
    found = {"backbone": jax.tree.map(lambda leaf: mask(next(names), leaf), params["backbone"])}
    covered = masks.cover_norms(found, params, net.layers)
    assert all(a is b for a, b in zip(jax.tree.leaves(found), (
        leaf for name, leaf in tree.named_leaves(covered).items() if name.endswith("/kernel")), strict=True))
    return covered, {name: leaf for name, leaf in tree.named_leaves(covered).items() if not name.endswith("/kernel")}


@pytest.mark.usefixtures("tiny_resnet")
def test_the_norms_of_a_network_are_covered_behind_removed_channels():
    """Each behind its own layer, for that and no other; a channel of which one entry is kept keeps its norm."""
    net, variables = _network(1)
    _, found = _covered(net, variables["params"], ("conv1", "layer1_0/conv2"))
    assert found.keys() == {f"backbone/{norm}/{leaf}" for norm in ("bn1", "layer1_0/bn2") for leaf in ("scale", "bias")}
    for mask in found.values():
        assert mask.tolist() == [0] + [1] * (len(mask) - 2) + [0]


@pytest.mark.usefixtures("tiny_resnet")
def test_the_norm_behind_a_routed_layer_is_covered_where_no_expert_needs_it():
    """A channel of it serves one of each expert; masks and parameters still fit."""
    net, variables = _network(2)
    covered, found = _covered(net, variables["params"], ("conv1", "layer1_0/conv1"))
    norm = [f"backbone/layer1_0/bn1/{name}" for name in ("scale", "bias")]
    assert found.keys() == {"backbone/bn1/scale", "backbone/bn1/bias", *norm}
    mask = np.broadcast_to(covered["backbone"]["layer1_0"]["conv1"]["kernel"],
                           variables["params"]["backbone"]["layer1_0"]["conv1"]["kernel"].shape)
    width = variables["params"]["backbone"]["layer1_0"]["bn1"]["scale"].size
    kept = mask.any((0, 1, 2)).reshape(-1, width).any(0)
    for name in norm:
        np.testing.assert_array_equal(found[name], kept)
    applied = masks.apply(variables["params"], covered)
    chex.assert_trees_all_equal_shapes(applied, variables["params"])
    chex.assert_trees_all_equal(applied["router"], variables["params"]["router"])


def test_a_norm_of_experts_loses_what_none_of_them_needs():
    spec = LayerSpec("a", (2, 6), 3, 1, (1, 1), "bn", (), routed=True)
    params = {"a": {"kernel": np.ones((2, 6))}, "bn": {"scale": np.ones(3), "bias": np.ones(3)}}
    mask = {"a": {"kernel": np.array([0, 1, 0, 0, 1, 1])}}
    assert masks.cover_norms(mask, params, (spec,))["bn"]["bias"].tolist() == [0, 1, 1]
    overlapping = dataclasses.replace(spec, width=4)
    assert masks.cover_norms(mask, params, (overlapping,))["bn"]["bias"] is None


def test_dense_is_dense():
    chex.assert_trees_all_equal(masks.cover_norms(None, PARAMS, ()), jax.tree.map(lambda _: None, PARAMS))
    chex.assert_trees_all_equal(masks.apply(PARAMS, {"a": None, "b": None, "bn": None}), PARAMS)


@pytest.mark.parametrize("wrong, message", [
    ({"bb": None}, "unknown group of masks 'bb'.*did you mean 'b'"),
    ({"a": {"kernel": np.ones((3, 2)), "bias": None}}, r"masks of a do not fit.*\(3, 2\).*\(2, 3\)"),
    ({"a": {"kernel": np.ones((1, 2, 3)), "bias": None}}, "masks of a do not fit"),
    ({"a": {"kernel": None}}, "masks of a do not fit its parameters.*expected the same tree, None where dense")])
def test_masks_of_other_parameters_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        masks.check(PARAMS, wrong)
    masks.check(PARAMS, {"a": {"kernel": np.ones(3), "bias": None}, "b": None})
