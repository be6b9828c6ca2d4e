"""The papers' counter, against every figure of SR-GKP's tables that its authors' code gives."""

import functools

import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import network
from advmoe_jax.pruning import paper_macs
from advmoe_jax.pruning.paper_macs import Pool

_slow = functools.partial(pytest.param, marks=pytest.mark.slow)  # their layers take seconds to trace
IMAGENET = dict(model="resnet", stem="imagenet", size=224, classes=1000)
TINY = dict(size=64, classes=200)


@functools.cache
def _net(model="cifar_resnet", size=32, classes=10, **fields):
    cfg = configs.default(model=model).model
    cfg.update(dict(num_experts=1, model_scale=1.0) | fields)
    net = network.make(cfg, (size, size, 3), classes)
    return net.layers, {name: leaf.shape for name, leaf in tree.named_leaves(net.shapes["params"]).items()}


def _masks(layers, sixteenths):
    """Of each layer as many sixteenths of the input channels are gone, in each filter others."""
    found = {}
    for spec in layers:
        channels, filters = spec.kernel[-2:]
        assert channels * sixteenths % 16 == 0
        place = (np.arange(channels)[:, None] + np.arange(filters)) % channels
        branch = found
        for name in spec.path.split("/"):
            branch = branch.setdefault(name, {})
        branch["kernel"] = (place >= channels * sixteenths // 16)[None, None]
    return found


def _count(pruned, sixteenths, relus=lambda spec: False, pools=lambda layers: (), **of):
    layers, sizes = _net(**of)
    masks = _masks([spec for spec in layers if pruned(spec)], sixteenths) if sixteenths else None
    return paper_macs.count(layers, sizes, masks, relus=[spec.path for spec in layers if relus(spec)],
                            pools=pools(layers))


def _in_blocks(spec):
    return "/layer" in spec.path and "shortcut" not in spec.path


def _in_blocks_3x3(spec):
    return _in_blocks(spec) and spec.kernel[0] == 3


def _of_cifar_resnet(layers):
    return (*paper_macs.shortcut_pools(layers), paper_macs.last_pool(layers))


@pytest.mark.parametrize("depth, sixteenths, macs, params", [
    (20, 0, 40_938_122, 269_722), (20, 7, 23_390_858, 152_794), (32, 0, 69_479_050, 464_154),
    (32, 7, 39_545_482, 262_554), (32, 10, 26_716_810, 176_154), (56, 0, 126_560_906, 853_018),
    (56, 7, 71_854_730, 482_074), (56, 10, 48_409_226, 323_098), _slow(110, 0, 254_995_082, 1_727_962),
    _slow(110, 7, 144_550_538, 975_994), _slow(110, 10, 97_217_162, 653_722)])
def test_resnets_of_cifar(depth, sixteenths, macs, params):
    """ReLUs are functions there, shortcuts pools."""
    found = _count(_in_blocks, sixteenths, pools=_of_cifar_resnet, depth=depth)
    assert found == {"macs": macs, "params": params}


@pytest.mark.parametrize("sixteenths, macs, params", [(0, 314_433_034, 14_728_266), (7, 178_183_690, 8_293_194)])
def test_vgg16(sixteenths, macs, params):
    """All are modules, an average pool of one pixel among them; the first convolution stays whole."""
    pools = [Pool(4, channels * size**2) for channels, size in ((64, 16), (128, 8), (256, 4), (512, 2), (512, 1))]
    found = _count(lambda spec: "features" in spec.path and not spec.path.endswith("_0"), sixteenths,
                   relus=lambda spec: spec.norm, pools=lambda _: (*pools, Pool(1, 512)), model="vgg")
    assert found == {"macs": macs, "params": params}


def _relus(spec):
    return spec.norm and "shortcut" not in spec.path


@pytest.mark.parametrize("pruned, sixteenths, relus, of, macs, params", [
    (_in_blocks, 0, None, dict(depth=56) | TINY, 506.254, 0.865),
    (_in_blocks, 6, None, dict(depth=56) | TINY, 318.690, 0.547),
    (_in_blocks, 0, _relus, dict(depth=50) | IMAGENET, 4122.828, 25_557_032),
    (_in_blocks_3x3, 12, None, dict(depth=50) | IMAGENET, 2725.954, 17_069_096),
    (_in_blocks, 6, None, dict(depth=50) | IMAGENET, 2759.672, 17_803_304),
    _slow(_in_blocks_3x3, 0, None, dict(depth=101, model="resnet") | TINY, 10081.092, 42.902),
    _slow(_in_blocks_3x3, 14, None, dict(depth=101, model="resnet") | TINY, 5721.113, 24.226)])
def test_what_is_given_in_millions(pruned, sixteenths, relus, of, macs, params):
    """ReLUs of the whole ResNet-50 are modules, torchvision's; all others here are functions. Of the pools of
    bottlenecks the first counts."""
    pools = {"imagenet": lambda _: (Pool(9, 64 * 56**2),)}.get(of.get("stem"), lambda _: ())
    if "model" not in of:
        pools = _of_cifar_resnet
    found = _count(pruned, sixteenths, relus or (lambda spec: False), pools, **of)
    assert round(found["macs"] / 1e6, 3) == macs
    assert found["params"] == params if isinstance(params, int) else round(found["params"] / 1e6, 3) == params


def test_biases_and_norms_that_are_masked():
    layers, sizes = _net(model="vgg", width=4)
    spec = layers[0]
    half = np.arange(4) < 2
    masks = {"backbone": {"features_0": {"kernel": half, "bias": half}, "features_1": {"scale": half, "bias": half}}}
    dense, found = (paper_macs.count(layers, sizes, given) for given in (None, masks))
    assert dense["macs"] - found["macs"] == spec.macs // 2 + 2 * 1024
    assert dense["params"] - found["params"] == 27 * 2 + 3 * 2


def test_what_is_not_there():
    layers, sizes = _net(model="vgg", width=4)
    with pytest.raises(UserError, match="unknown layer 'backbone/feature_0': expected .* did you mean 'backbone/feat"):
        paper_macs.count(layers, sizes, relus=["backbone/feature_0"])
    with pytest.raises(UserError, match="no size of backbone/features_0/kernel: expected those of all parameters"):
        paper_macs.count(layers, {})
