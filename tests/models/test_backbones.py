"""What every backbone promises, for every module of advmoe_jax.models that makes one; a new one is covered as soon as
its file is there.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from flax import linen as nn

from advmoe_jax.core import config, find
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import cifar_resnet, densenet, network, resnet, vgg, wide_resnet

SHAPE, CLASSES, PASSES, BATCH = (8, 8, 3), 4, 2, 6
# The others are as the config has them. Behind a space stands another form of the same backbone.
SMALL = {"resnet": dict(depth=10), "resnet bottleneck": dict(depth=8, stem="imagenet"),
         "cifar_resnet": dict(depth=8, shortcut_pad="both"), "vgg": dict(depth=4),
         "vgg released": dict(depth=4, form="released"),
         "wide_resnet": dict(depth=10), "wide_resnet imagenet": dict(depth=10, stem="imagenet"),
         "densenet": dict(depth=10, growth_rate=4), "vit": dict(depth=2, heads=2, patch=4)}
PADS_CHANNELS = ("cifar_resnet",)  # its shortcuts add empty ones
OF_AN_EXPERT = {"vit": 2}  # layers, if not one
ROUTED = dict(num_experts=2, model_scale=0.5, routing="layer", router_width=4, dispatch="blocks")
NAMES = find.names("models", "backbone")
each = pytest.mark.parametrize("name", NAMES)
each_but_resnet = pytest.mark.parametrize("name", slow_but(lambda name: name != "resnet", NAMES))  # takes longest
each_but_resnets = pytest.mark.parametrize("name", slow_but(lambda name: name not in ("resnet", "wide_resnet"), NAMES))
each_form = pytest.mark.parametrize("name", sorted({*NAMES, *SMALL}))


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    """ResNets of two bottlenecks, a VGG of three convolutions, and two stages of the others. Most of what a test costs
    here is compiling their layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.BOTTLENECKS, "8", (1, 1))
        for module in (cifar_resnet, wide_resnet, densenet):
            patch.setattr(module, "_STAGES", 2)
        patch.setitem(vgg.DEPTHS, "4", (1, 1, 1))
        yield


def _module(name):
    return name.partition(" ")[0]


def _design(name, routed):
    cfg = config.default(model=_module(name)).model
    cfg.update(dict(width=4, **SMALL.get(name, {}), **(ROUTED if routed else dict(num_experts=1))))
    return network.make(cfg, SHAPE, CLASSES)


@functools.cache
def _net(name):
    """A routed network with its variables."""
    net = _design(name, routed=True)
    return net, jax.jit(net.init)(jax.random.key(0))


def _images(*begin):
    return jax.random.uniform(jax.random.key(1), (*begin, *SHAPE))


@each_form
@pytest.mark.parametrize("routed", [False, True], ids=["dense", "routed"])
def test_layers_are_those_of_the_parameters(name, routed):
    net = _design(name, routed)
    params = trees.named_leaves(jax.eval_shape(net.init, jax.random.key(0))["params"])
    kernels = {path.removesuffix("/kernel"): leaf.shape for path, leaf in params.items() if path.endswith("/kernel")}
    assert {spec.path: spec.kernel for spec in net.layers} == kernels
    assert net.shapes == jax.eval_shape(net.init, jax.random.key(0)), "found on another way"


@each_form
def test_variables_and_outputs_are_float32_where_float64_is_the_default(name):
    """As jax_enable_x64 makes it: a checkpoint of one setting is read under the other."""
    with jax.enable_x64(True):
        net = _design(name, routed=True)
        found = jax.eval_shape(lambda key, x: (variables := net.init(key), net.apply(variables, x)),
                               jax.random.key(0), jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(found) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {
        jnp.dtype("float32")}


@each_form
def test_inputs_have_the_channels_that_a_layer_reads(name):
    net = _design(name, routed=True)
    written = {}
    for spec in net.layers:
        channels = [written[source] for source in spec.inputs]  # of earlier layers
        found = sum(channels) if spec.join == "concat" else max(channels, default=SHAPE[-1])
        assert found == spec.kernel[-2] * spec.groups, spec
        assert spec.join == "concat" or len(set(channels)) < 2 or name in PADS_CHANNELS, spec
        written[spec.path] = spec.width


@each_form
def test_every_router_reads_what_its_layer_reads(name):
    net = _design(name, routed=True)
    first = [spec for spec in net.layers if spec.routed][::OF_AN_EXPERT.get(name, 1)]
    routers = [spec for spec in net.layers if spec.path.startswith("router/") and not spec.path.endswith("/scores")]
    assert first and [(spec.inputs, spec.join) for spec in routers] == [(spec.inputs, spec.join) for spec in first]


class _NoNorm(nn.Module):
    """In the place of BatchNorm."""

    def __call__(self, x, train):
        return x


@each_but_resnets
def test_a_backbone_may_have_no_batch_norm(name, monkeypatch):
    usual = _net(name)[0].layers
    monkeypatch.setattr(importlib.import_module(f"advmoe_jax.models.{name}"), "BatchNorm", _NoNorm, raising=False)
    net = _design(name, routed=True)
    assert net.layers == tuple(dataclasses.replace(spec, norm=None) for spec in usual)
    variables = jax.jit(net.init)(jax.random.key(0))
    assert "backbone" not in variables["batch_stats"]
    assert np.all(np.isfinite(jax.jit(net.apply)(variables, _images(BATCH))[0]))


@each_but_resnet
def test_each_of_several_passes_is_normalised_by_its_own_statistics(name):
    """AdvMoE's clean and attacked images share a batch. A backbone that does not hand `train` on to each BatchNorm
    mixes them."""
    net, variables = _net(name)
    x = _images(BATCH, PASSES) * jnp.array([0.2, 1.0])[None, :, None, None, None]
    train = jax.jit(net.apply_train)
    logits, _, stats = train(variables, x)
    for i in range(PASSES):
        alone, _, updated = train(variables, x[:, i])
        np.testing.assert_allclose(logits[:, i], alone, rtol=1e-3, atol=1e-3 * float(jnp.abs(alone).max()))
        variables = {"params": variables["params"], "batch_stats": updated}
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5),
                 stats.get("backbone", {}), updated.get("backbone", {}))


@each
def test_in_evaluation_no_image_depends_on_the_others(name):
    net, variables = _net(name)
    x, evaluate = _images(BATCH), jax.jit(net.apply)
    logits, _ = evaluate(variables, x)
    others, _ = evaluate(variables, x.at[1:].set(1 - x[1:]))
    np.testing.assert_allclose(logits[0], others[0], rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits[1], others[1], rtol=1e-4, atol=1e-5)


class _Plain(nn.Module):
    """Experts are asked for, and no layer is routed."""

    @nn.compact
    def __call__(self, x, choose, train):
        return nn.Dense(CLASSES)(x.mean((1, 2)))


@pytest.mark.parametrize("routing", ["layer", "global"])
def test_experts_without_a_routed_layer_are_refused(routing):
    cfg = config.default(model="resnet").model
    cfg.routing = routing
    net = network.make(cfg, SHAPE, CLASSES)
    with pytest.raises(UserError, match="_Plain has several experts and no routed layer"):
        dataclasses.replace(net, module=net.module.clone(backbone=_Plain())).shapes
