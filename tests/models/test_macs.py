"""MACs against numbers counted by hand; those of the papers' networks are in test_golden.py."""

import jax
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.models import macs, network
from advmoe_jax.models import model as models

DENSE = dict(num_experts=1, model_scale=1.0)


def _cfg(**fields):
    cfg = configs.default().model
    cfg.update(fields)
    return cfg


def count(shape=(32, 32, 3), classes=10, **fields):
    return macs.count(network.make(_cfg(**fields), shape, classes))


def test_dense_by_hand():
    stem = 9 * 1 * 4 * 64
    stage1 = 4 * (9 * 4 * 4 * 64)
    others = sum(9 * c * 2 * c * pixels + 3 * (9 * 2 * c * 2 * c * pixels) + c * 2 * c * pixels
                 for c, pixels in ((4, 16), (8, 4), (16, 1)))
    total = stem + stage1 + others + 32 * 10
    assert total == 137_792
    params = 9 * 4 + 4 * (9 * 4 * 4) + sum(9 * c * 2 * c + 3 * (9 * 2 * c * 2 * c) + c * 2 * c for c in (4, 8, 16))
    norms = 2 * (4 + 4 * 4 + sum(5 * c for c in (8, 16, 32)))  # a scale and a bias for each channel
    params += norms + 32 * 10 + 10
    assert count((8, 8, 1), width=4, **DENSE) == {
        "pathway": total, "router": 0, "total": total, "executed": total, "params": params}


def test_channels_of_no_expert_are_not_computed():
    fields = dict(width=16, num_experts=2, model_scale=0.25)
    every, own = (count((8, 8, 1), dispatch=kind, **fields) for kind in ("all", "blocks"))
    routed = sum(spec.macs for spec in network.make(_cfg(**fields), (8, 8, 1), 10).layers if spec.routed)
    assert every["executed"] == every["total"] + routed and own["executed"] == own["total"]


def test_experts_and_routers_by_hand():
    # As above, but that the stem has all 8 channels and the first block goes from 8 to 4.
    routed = 9 * 8 * 4 * 64 + 3 * (9 * 4 * 4 * 64) + 3 * (4_608 + 3 * 9_216)
    pathway = 9 * 1 * 8 * 64 + routed + 8 * 4 * 64 + 3 * 512 + 32 * 10
    inputs = [8, 4, 4, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 32, 32, 32]
    router = sum(c * 3 + 3 * 2 for c in inputs)
    assert (pathway, router) == (151_360, 744)
    # Two experts of half the channels store as many as the dense network, and read what one of them writes.
    stored = sum(9 * read * 2 * w + 3 * (9 * w * 2 * w) + read * w for read, w in ((8, 4), (4, 8), (8, 16), (16, 32)))
    norms = 2 * (8 + 5 * (4 + 8 + 16 + 32))
    params = 9 * 8 + stored + norms + 32 * 10 + 10 + router + len(inputs) * (3 + 2)
    assert count((8, 8, 1), width=8, num_experts=2, model_scale=0.5, router_width=3, dispatch="all") == {
        "pathway": pathway, "router": router, "total": pathway + router, "executed": pathway + routed + router,
        "params": params}


def test_masks_are_counted_and_computed_all_the_same():
    """Zeros of a mask cost nothing on paper, and as much as ever in a convolution."""
    net = network.make(_cfg(width=4, **DENSE), (8, 8, 1), 10)
    dense = macs.count(net)
    masks = {"backbone": {"conv1": {"kernel": np.arange(4) < 1}}}
    spec = net.layers[0]
    assert spec.path == "backbone/conv1"
    gone = spec.macs * 3 // 4
    assert macs.count(net, masks) == dense | {"pathway": dense["pathway"] - gone, "total": dense["total"] - gone,
                                              "params": dense["params"] - 27}


@pytest.mark.parametrize("fields, group", [
    (dict(num_experts=2, model_scale=0.5, dispatch="all"), "backbone"), (DENSE | dict(name="ensemble"), "member0"),
    (DENSE | dict(name="mixture"), "expert1"), (DENSE | dict(name="team"), "member1")])
def test_layers_add_up_to_the_model(fields, group, tiny_resnet):
    """With a mask in one of the networks, of half the weights of a layer."""
    config = configs.default(model=fields.get("name", "resnet")).model
    config.update(dict(depth=4, width=8, router_width=3) | fields)
    model = models.make(config, (8, 8, 1), 10)
    path = next(spec.path for spec in model.layers if spec.path.startswith(group) and spec.path.endswith("0/conv1"))
    mask = np.arange(8) % 2 < 1
    masks = {group: mask}
    for name in reversed(f"{path}/kernel".split("/")[1:]):
        masks[group] = {name: masks[group]}
    if group != "backbone":
        assert path.startswith(f"{group}/backbone/")
    for given in (None, masks):
        layers, whole = model.layer_costs(given), model.costs(given)
        assert [cost.path for cost in layers] == [spec.path for spec in model.layers]
        assert sum(cost.macs for cost in layers) == whole["total"]
        assert sum(cost.executed for cost in layers) == whole["executed"]
        norms = sum(leaf.size for name, leaf in _leaves(model) if not name.endswith("kernel") and "/linear/" not in name
                    and "/hidden/" not in name and "/scores/" not in name)
        assert sum(cost.params for cost in layers) + norms == whole["params"]
    masked, dense = ({cost.path: cost for cost in model.layer_costs(given)}[path] for given in (masks, None))
    assert (2 * masked.macs, 2 * masked.params, masked.executed) == (dense.macs, dense.params, dense.executed)


def _leaves(model):
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(
        model.shapes["params"])]
