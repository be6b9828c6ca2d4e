"""MACs against numbers counted by hand, and ResNet-18 against the exact counts of its papers' variants."""

import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.models import macs, network

DENSE = dict(num_experts=1, model_scale=1.0)
S_DENSE = dict(num_experts=1, model_scale=0.5)
IMAGENET = dict(shape=(224, 224, 3), classes=1000, stem="imagenet")


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


@pytest.mark.parametrize("expected,fields", [
    (555_422_720, DENSE),
    (139_299_328, S_DENSE),
    (151_718_400, dict(num_experts=2, model_scale=0.5)),
    (1_814_073_344, DENSE | IMAGENET),
    (483_149_824, S_DENSE | IMAGENET),
])
def test_pathway_of_resnet18(expected, fields):
    assert count(**fields)["pathway"] == expected


def test_router_of_the_released_code():
    assert count(routing="global")["router"] == 40_550_528


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
