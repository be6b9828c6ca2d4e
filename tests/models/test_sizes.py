"""Backbones of papers by their numbers of parameters, and what their forms differ in; nothing is compiled."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.interop.torch_import import layer_names
from advmoe_jax.models import cifar_resnet, needs, network, resnet, vgg, wide_resnet
from advmoe_jax.models import model as models
from advmoe_jax.models.layers import Experts, scaled_width
from advmoe_jax.ops.conv import conv2d


def _net(model, size=32, classes=10, **fields):
    cfg = configs.default(model=model).model
    cfg.update(dict(num_experts=1, model_scale=1.0) | fields)
    return network.make(cfg, (size, size, 3), classes)


@pytest.mark.parametrize("params, model, fields", [
    (658_586, "cifar_resnet", dict(depth=44)), (9_231_114, "vgg", dict(depth=11)),
    (23_520_842, "resnet", dict(depth=50)), pytest.param(
        60_192_808, "resnet", dict(depth=152, stem="imagenet", classes=1000), marks=pytest.mark.slow)])
def test_parameters(params, model, fields):
    """Of He's, kuangliu's and torchvision's; more of them are in tests/pruning/test_paper_macs.py."""
    assert tree.size(_net(model, **fields).shapes["params"]) == params


@pytest.mark.parametrize("model, stem, names", [
    ("cifar_resnet", None, {"backbone/layer3_2/conv2": "layer3.2.conv2", "backbone/linear": "linear"}),
    ("resnet", "imagenet", {"backbone/layer1_0/shortcut": "layer1.0.downsample.0", "backbone/linear": "fc",
                            "backbone/layer3_5/conv3": "layer3.5.conv3"}),
    ("resnet", "cifar", {"backbone/layer1_0/shortcut": "layer1.0.shortcut.0", "backbone/linear": "linear"}),
    ("vgg", None, {"backbone/features_0": "features.0", "backbone/features_40": "features.40",
                   "backbone/features_14": "features.14", "backbone/classifier": "classifier"})])
def test_names_of_pytorch(model, stem, names):
    net = _net(model, **({"stem": stem, "depth": 50} if stem else {}))
    found = layer_names(net)
    assert found.keys() == {spec.path for spec in net.layers} and names.items() <= found.items()


def test_the_stride_of_a_bottleneck_is_in_its_3x3():
    net = _net("resnet", depth=50, stem="imagenet", size=64)
    strides = {spec.path.removeprefix("backbone/"): (spec.kernel[0], spec.stride) for spec in net.layers}
    assert [strides[f"layer2_0/{name}"] for name in ("conv1", "conv2", "conv3", "shortcut")] == [
        (1, 1), (3, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("pad, place", [("end", 0), ("both", 2)])
def test_shortcuts_without_parameters(pad, place):
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    y = np.asarray(cifar_resnet.shortcut(x, 8, 2, pad))
    assert y.shape == (2, 3, 3, 8)
    np.testing.assert_array_equal(y[..., place:place + 4], x[:, ::2, ::2])
    assert not np.delete(y, np.arange(place, place + 4), -1).any()


@pytest.mark.parametrize("size", [7, 40])
def test_a_vgg_takes_images_of_any_size(size):
    net = _net("vgg", size=size, width=4)
    logits, _ = jax.eval_shape(net.apply, net.shapes, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
    assert logits.shape == (2, 10) and net.shapes == _net("vgg", width=4).shapes


@pytest.mark.parametrize("height, width", [(2, 2), (4, 6), (3, 5), (1, 7)])
def test_the_pool_of_the_released_vgg(height, width):
    """PyTorch's adaptive one: from floor(i n / 2) to ceil((i + 1) n / 2)."""
    x = np.random.default_rng(0).random((2, height, width, 3), np.float32)
    rows, columns = ([(0, math.ceil(size / 2)), (size // 2, size)] for size in (height, width))
    expected = [[x[:, a:b, c:d].mean((1, 2)) for c, d in columns] for a, b in rows]
    np.testing.assert_allclose(vgg._averaged(jnp.asarray(x)), np.moveaxis(np.array(expected), 2, 0), rtol=1e-5)


@pytest.mark.parametrize("name, least, fields", [
    ("resnet", 33, dict(stem="imagenet")), ("wide_resnet", 33, dict(stem="imagenet")),
    ("ensemble", 33, dict(stem="imagenet")), ("vgg", 32, dict(form="released")), ("vgg", 1, {}), ("densenet", 1, {})])
def test_images_that_are_too_small(name, least, fields):
    """Also for the members of an ensemble, and where only one side is."""
    cfg = configs.default(model=name).model
    cfg.update(fields)
    needs.check_pixels(cfg, (least, least, 3))
    for height, width in ((least - 1, 64), (64, least - 1)) if least > 1 else ():
        said = rf"images of {height}x{width} .* {least}x{least} or more: .* model\.\w+=cifar"
        with pytest.raises(UserError, match=said):
            models.make(cfg, (height, width, 3), 10)


@pytest.mark.parametrize("channels", [3, 12, 16, 48, 49, 64, 160, 16384])
def test_the_least_scale_that_is_named_is_enough(channels):
    with pytest.raises(UserError, match="leaves none of") as error:
        scaled_width(channels, 0.9 / channels)
    least = float(re.search(r"expected (\S+) or more", str(error.value))[1])
    assert scaled_width(channels, least) >= 1 and least < 1 / channels + 1e-4


def test_a_wide_resnet_reads_what_its_norms_give():
    """Where channels change, the shortcut reads the same as the first convolution, and else it is the input."""
    block = wide_resnet.Block(4, 2, Experts(1, 1.0, "shared", "equal"))
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    variables = block.init(jax.random.key(1), x, None, 1)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
                          variables["params"])

    def conv(x, name, stride=1):
        return conv2d(x, params[name]["kernel"], stride)

    def active(x, name):
        return jax.nn.relu(x * params[name]["scale"] / np.sqrt(1 + 1e-5) + params[name]["bias"])

    with jax.numpy_rank_promotion("allow"):
        read = active(x, "bn1")
        expected = conv(active(conv(read, "conv1", 2), "bn2"), "conv2") + conv(read, "shortcut", 2)
        found = block.apply({"params": params, "batch_stats": variables["batch_stats"]}, x, None, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    same = block.clone(stride=1).init(jax.random.key(1), x, None, 1)["params"]
    assert "shortcut" not in same and "shortcut" in params


def test_where_a_wide_resnet_has_shortcuts():
    for width, stages in ((32, [1, 2, 3]), (16, [2, 3])):  # WRN-10-1 starts with the channels of its stem
        paths = [spec.path for spec in _net("wide_resnet", depth=10, width=width).layers]
        assert [path for path in paths if "shortcut" in path] == [f"backbone/layer{i}_0/shortcut" for i in stages]


def test_a_layer_of_a_densenet_reads_all_before_it():
    layers = {spec.path.removeprefix("backbone/"): spec for spec in _net("densenet", depth=16, model_scale=.2).layers}
    grown = [f"backbone/block1_{i}/conv2" for i in range(2)]
    assert layers["block1_1/conv1"].inputs == ("backbone/conv1", grown[0])
    assert layers["transition1/conv"].inputs == ("backbone/conv1", *grown)
    # r = 0.2 of 24, 48 and 12 channels: 4, 9 and 2; a transition halves what it reads.
    assert [layers[name].kernel for name in ("conv1", "block1_0/conv1", "block1_0/conv2", "block1_1/conv1",
                                             "transition1/conv", "block2_0/conv1")] == [
        (3, 3, 3, 4), (1, 1, 4, 9), (3, 3, 9, 2), (1, 1, 6, 9), (1, 1, 8, 4), (1, 1, 4, 9)]
    assert [layers[f"block{i}_0/conv1"].out_size for i in (1, 2, 3)] == [(32, 32), (16, 16), (8, 8)]


@pytest.mark.parametrize("model, routed", [("wide_resnet", 9), ("densenet", 6)])
@pytest.mark.parametrize("routing, experts, num_experts, model_scale", slow_but(lambda case: case[0] == "embedding", [
    ("layer", "shared", 3, .8), ("embedding", "disjoint", 3, .3), ("global", "shared", 8, .1)]))
def test_mixtures_of_any_routing(model, routed, routing, experts, num_experts, model_scale):
    """In training, two passes over three images: what is routed makes its choices."""
    net = _net(model, size=8, depth=10, routing=routing, experts=experts, num_experts=num_experts,
               model_scale=model_scale)
    assert sum(spec.routed for spec in net.layers) == routed
    logits, aux, stats = jax.eval_shape(net.apply_train, net.shapes, jax.ShapeDtypeStruct((3, 2, 8, 8, 3), jnp.float32))
    choices = 1 if routing == "global" else routed
    assert logits.shape == (3, 2, 10) and aux["router_logits"].shape == (3, 2, choices, num_experts)
    assert jax.tree.structure(stats) == jax.tree.structure(net.shapes["batch_stats"])


@pytest.mark.parametrize("model, stem", [("densenet", None), ("wide_resnet", "cifar"), ("wide_resnet", "imagenet")])
def test_an_image_may_be_of_any_size(model, stem):
    """A DenseNet has no pool where there is nothing to pool."""
    for size in (1, 7):
        net = _net(model, size=size, width=4, depth=10, **({"stem": stem} if stem else {}))
        logits, _ = jax.eval_shape(net.apply, net.shapes, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
        assert logits.shape == (2, 10)


def test_a_bias_of_a_convolution_is_for_dense_vggs():
    biases = [name for name in tree.named_leaves(_net("vgg").shapes["params"]) if name.endswith("bias")]
    assert len(biases) == 13 + 13 + 1
    mixture = _net("vgg", num_experts=2, model_scale=0.5)
    assert sum(spec.routed for spec in mixture.layers) == 12
    assert "backbone/features_0/bias" not in tree.named_leaves(mixture.shapes["params"])


def test_a_routed_bottleneck(monkeypatch):
    """In the ImageNet form shortcuts are routed, in the CIFAR form they are dense."""
    monkeypatch.setitem(resnet.BOTTLENECKS, "8", (1, 1))
    for stem, count in (("imagenet", 8), ("cifar", 6)):
        layers = _net("resnet", depth=8, stem=stem, num_experts=2, model_scale=0.5).layers
        assert sum(spec.routed for spec in layers) == count
    assert next(spec for spec in layers if spec.path == "backbone/layer2_0/conv3").width == 256


@pytest.mark.parametrize("model, depth, message", [
    ("cifar_resnet", 21, "model.depth of a cifar_resnet is 21: expected 6 n \\+ 2, .*; the nearest is 20"),
    ("cifar_resnet", 2, "the nearest is 8"), ("cifar_resnet", -7, "the nearest is 8"),
    ("cifar_resnet", 10**9, "the nearest is 1202"),
    ("wide_resnet", 26, "model.depth of a wide_resnet is 26: expected 6 n \\+ 4, .*; the nearest is 28"),
    ("densenet", 0, "model.depth of a densenet is 0: expected 6 n \\+ 4, .*; the nearest is 10"),
    ("densenet", 1210, "the nearest is 1204"), ("vgg", 17, "unknown model.depth of a vgg '17': expected one of"),
    ("resnet", 51, "unknown model.depth of a resnet '51': expected one of .*; did you mean '50'")])
def test_depths_that_there_are_not(model, depth, message):
    config = configs.default(model=model)
    config.model.depth = depth
    for check in (configs.check, lambda config: network.make(config.model, (32, 32, 3), 10)):
        with pytest.raises(UserError, match=message):
            check(config)
