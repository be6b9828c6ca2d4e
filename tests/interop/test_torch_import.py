"""State dicts of the released AdvMoE code as variables: names, copies of the router, messages."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from advmoe_jax.core import config, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.interop.torch_import import layer_names, norm_name, to_variables
from advmoe_jax.models import network

ROUTER = "router."


@functools.cache
def moe(**changes):
    cfg = config.default().model
    cfg.update(dict(width=8, depth=18, routing="global", router_width=4) | changes)
    return network.make(cfg, (8, 8, 3), 10)


@functools.cache
def dense():
    return moe(num_experts=1)


def parts(net):
    """Random state dicts of the backbone and of the router, as PyTorch would save each."""
    rng, backbone, router, names = np.random.default_rng(0), {}, {}, layer_names(net)
    for spec in net.layers:
        layer, part = names[spec.path], router if spec.path.startswith("router/") else backbone
        shape = (*spec.kernel[:1:-1], *spec.kernel[:2]) if len(spec.kernel) == 4 else spec.kernel[::-1]
        part[f"{layer}.weight"] = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            part[f"{layer}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
        if spec.norm:
            for name in ("weight", "bias", "running_mean", "running_var"):
                part[f"{norm_name(layer)}.{name}"] = rng.uniform(.5, 1, spec.width).astype(np.float32)
            part[f"{norm_name(layer)}.num_batches_tracked"] = np.array(7)
    return backbone, router


def released(net):
    """The whole state dict, the router in the model and in every routed convolution."""
    state, router = parts(net)
    names = layer_names(net)
    for prefix in ("", *(f"{names[spec.path]}." for spec in net.layers if spec.routed)):
        state |= {f"{prefix}{ROUTER}{name}": value for name, value in router.items()}
    return state


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layer, norm", [
    ("conv1", "bn1"), ("layer2.0.conv2", "layer2.0.bn2"), ("layer2.0.shortcut.0", "layer2.0.shortcut.1"),
    ("layer2.0.downsample.0", "layer2.0.downsample.1"), ("features.10", "features.11")])
def test_norm_name(layer, norm):
    assert norm_name(layer) == norm


def test_layer_names():
    cifar, imagenet = (layer_names(moe(stem=stem)) for stem in ("cifar", "imagenet"))
    assert list(cifar) == [spec.path for spec in moe().layers]
    for path, name in {
            "backbone/conv1": "conv1", "backbone/layer1_1/conv2": "layer1.1.conv2",
            "router/conv1": "conv1", "router/layer3_2_conv1": "layer3.2.conv1", "router/fc": "fc"}.items():
        assert cifar[path] == imagenet[path] == name
    shortcut = "backbone/layer4_0/shortcut"
    assert (cifar[shortcut], cifar["backbone/linear"]) == ("layer4.0.shortcut.0", "linear")
    assert (imagenet[shortcut], imagenet["backbone/linear"]) == ("layer4.0.downsample.0", "fc")


def test_a_backbone_without_pytorch_names():
    net = dataclasses.replace(dense(), backbone="strange")
    assert layer_names(net) == {}
    assert "/backbone/bn1/mean has no PyTorch name: expected a network" in refused(net, {})


@pytest.mark.parametrize("changes", [{}, dict(num_experts=1), dict(stem="imagenet")])
def test_every_tensor_arrives_once(changes):
    net = moe(**changes)
    backbone, router = parts(net)
    variables = to_variables(net, backbone, router)
    expected = jax.eval_shape(net.init, jax.random.key(0))
    assert jax.eval_shape(lambda: variables) == expected

    def sums(arrays):
        return sorted(float(np.sum(np.asarray(a), dtype=np.float64)) for a in arrays)

    weights = [v for n, v in [*backbone.items(), *router.items()] if not n.endswith("tracked")]
    np.testing.assert_allclose(sums(jax.tree.leaves(variables)), sums(weights), rtol=1e-9)


def test_where_tensors_arrive():
    net, state = moe(), released(moe())
    found = tree.named_leaves(to_variables(net, state))
    for path, name in {
            "params/backbone/layer2_0/bn1/scale": "layer2.0.bn1.weight",
            "params/backbone/layer2_0/bn1/bias": "layer2.0.bn1.bias",
            "batch_stats/backbone/layer2_0/shortcut_bn/mean": "layer2.0.shortcut.1.running_mean",
            "batch_stats/router/layer3_2_bn2/var": "layer4.1.conv2.router.layer3.2.bn2.running_var",
            "params/router/fc/bias": "router.fc.bias"}.items():
        np.testing.assert_array_equal(found[path], state[name])
    np.testing.assert_array_equal(found["params/backbone/linear/kernel"], state["linear.weight"].T)
    kernel = found["params/backbone/layer3_0/conv1/kernel"]
    assert kernel[2, 0, 1, 5] == state["layer3.0.conv1.weight"][5, 1, 2, 0]


def test_seventeen_copies_of_the_router_are_one():
    state = released(moe())
    assert sum(name.endswith("router.fc.bias") for name in state) == 17
    assert_equal(to_variables(moe(), state), to_variables(moe(), *parts(moe())))


def test_a_router_given_twice_must_be_the_same():
    state, router = released(moe()), parts(moe())[1]
    assert_equal(to_variables(moe(), state, router), to_variables(moe(), state))
    assert "router_state_dict.router.fc.bias" in refused(moe(), state, {**router, "fc.bias": router["fc.bias"] + 1})


def refused(net, *state_dicts):
    """The message of the UserError; always one line."""
    with pytest.raises(UserError) as caught:
        to_variables(net, *state_dicts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_copies_of_the_router_that_differ():
    state = released(moe())
    state["layer3.1.conv2.router.fc.bias"] = state["router.fc.bias"] + 1
    assert refused(moe(), state) == ("copies of the router differ: router.fc.bias is not "
                                     "layer3.1.conv2.router.fc.bias; expected one router in all layers")


def test_no_router():
    assert "has no router: expected tensors such as router." in refused(moe(), parts(moe())[0])


def test_a_router_where_none_is_wanted():
    state = parts(dense())[0] | {f"{ROUTER}{name}": value for name, value in parts(moe())[1].items()}
    assert "unknown tensor router." in refused(dense(), state)


@pytest.mark.parametrize("routing, where", [("layer", "layer0"), ("embedding", "bn1")])
def test_routers_that_have_no_pytorch_form(routing, where):
    assert re.match(rf"\S*router/{where}/\S+ has no PyTorch name: expected", refused(moe(routing=routing), {}))


def test_missing():
    state = parts(dense())[0]
    state["layer2.0.conv_1.weight"] = state.pop("layer2.0.conv1.weight")
    assert refused(dense(), state) == ("the state dict has no tensor layer2.0.conv1.weight, which this network needs; "
                                       "the nearest name is layer2.0.conv_1.weight")
    del state["layer2.0.conv_1.weight"]
    assert refused(dense(), state).endswith("layer2.0.conv1.weight, which this network needs")


def test_unknown():
    state = parts(dense())[0]
    assert re.fullmatch(r"unknown tensor layer2\.0\.conv3\.weight \(8, 8, 3, 3\) in the state dict: expected only .*; "
                        r"the nearest name is layer2\.\d\.conv\d\.weight",
                        refused(dense(), state | {"layer2.0.conv3.weight": np.zeros((8, 8, 3, 3))}))
    assert "unknown tensor conv1.bias" in refused(dense(), state | {"conv1.bias": np.zeros(4)})


@pytest.mark.parametrize("name, expected", [
    ("conv1.weight", "(4, 3, 3, 3)"), ("linear.weight", "(10, 32)"), ("bn1.running_var", "(4,)")])
def test_wrong_shape(name, expected):
    state = parts(dense())[0]
    state[name] = state[name].T[:2]
    assert refused(dense(), state) == f"tensor {name} of the state dict is {state[name].shape}: expected {expected}"


@pytest.mark.parametrize("value, message", [
    (np.nan, "has 4 values that are not finite in float32"), (np.inf, "has 4 values that are not finite in float32"),
    (1e300, "has 4 values that are not finite in float32"), (1j, "is complex128: expected real numbers"),
    ("x", "is <U1: expected real numbers")])
def test_values_that_are_no_weights(value, message):
    assert f"tensor bn1.weight of the state dict {message}" in refused(
        dense(), parts(dense())[0] | {"bn1.weight": np.full(4, value)})


@pytest.mark.oracle
@pytest.mark.parametrize("size, stride, train", [(3, 1, True), (3, 2, False), (1, 2, True), (7, 2, False)])
def test_convolution_and_batch_norm_are_those_of_torch(size, stride, train):
    torch = pytest.importorskip("torch")
    from flax import linen as nn

    from advmoe_jax.models.layers import BatchNorm, Conv

    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchNorm(name="bn")(Conv(6, size, stride, name="conv")(x), train)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 8, 5))
    twin = torch.nn.Sequential(torch.nn.Conv2d(5, 6, size, stride, size // 2, bias=False), torch.nn.BatchNorm2d(6))
    twin = twin.double().train(train)
    for tensor in twin.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.tensor(rng.uniform(.5, 1, tensor.shape)))
    state = {name: tensor.numpy().copy() for name, tensor in twin.state_dict().items()}
    with jax.enable_x64(True):
        variables = {"params": {"conv": {"kernel": state["0.weight"].transpose(2, 3, 1, 0)},
                                "bn": {"scale": state["1.weight"], "bias": state["1.bias"]}},
                     "batch_stats": {"bn": {"mean": state["1.running_mean"], "var": state["1.running_var"]}}}
        ours, updated = Pair().apply(variables, x, mutable=["batch_stats"])
    theirs = twin(torch.tensor(x.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(ours, theirs.detach().numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-10)
    if train:
        n, running = ours[..., 0].size, jax.tree.map(np.asarray, updated["batch_stats"]["bn"])
        np.testing.assert_allclose(running["mean"], twin[1].running_mean, rtol=1e-10)
        kept = .9 * state["1.running_var"]
        np.testing.assert_allclose(kept + (running["var"] - kept) * n / (n - 1), twin[1].running_var, rtol=1e-10)
