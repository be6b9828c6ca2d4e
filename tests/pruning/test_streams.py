"""Channels that go whole: what is left of a network is the narrower dense one, which computes the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import densenet, network, resnet, vgg, wide_resnet
from advmoe_jax.ops import masks as masking
from advmoe_jax.pruning import search, streams
from advmoe_jax.systems import mask_search
from advmoe_jax.systems.sources import Source

SHAPE, CLASSES = (8, 8, 3), 4
NETS = {"resnet": dict(depth=6), "vgg": dict(depth=4), "wide_resnet": dict(depth=10),
        "densenet": dict(depth=10, growth_rate=4)}


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.DEPTHS, "6", (1, 1))
        patch.setitem(vgg.DEPTHS, "4", (1, 1, 1))
        for module in (wide_resnet, densenet):
            patch.setattr(module, "_STAGES", 2)
        yield


def _net(name, scale, **fields):
    cfg = configs.default(model=name).model
    cfg.update(dict(num_experts=1, model_scale=scale, width=8) | NETS[name] | fields)
    return network.make(cfg, SHAPE, CLASSES)


@functools.cache
def _masked(name, keep=0.5):
    """A dense network, and the masks of a search that begins with random scores."""
    net = _net(name, 1.0)
    searched = tuple(spec for spec in net.layers if len(spec.kernel) == 4)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), net.shapes["params"])
    how = search.Search(net.layers, searched, keep, "filter", is_coupled=True)
    numbers = np.random.default_rng(0)
    scores = {f"{spec.path}/kernel": numbers.normal(size=spec.kernel).astype(np.float32) for spec in searched}
    return net, how, scores, search.soft_masks(search.begin(params, how, scores), how)


@pytest.mark.parametrize("name", slow_but(lambda name: name == "densenet", NETS))
def test_what_is_left_costs_what_the_narrower_network_does(name):
    """In multiply-accumulates; where each norm reads one convolution, in parameters too."""
    net, _, _, masks = _masked(name)
    ours, narrow = net.costs(masks), _net(name, 0.5).costs()
    assert ours["pathway"] == narrow["pathway"] < 0.35 * net.costs()["pathway"]
    if name in ("resnet", "vgg"):
        assert ours["params"] == narrow["params"]


@pytest.mark.parametrize("name, fields, macs, params", [
    ("resnet", {}, 139_299_328, 2_797_610),
    pytest.param("vgg", dict(form="released"), 79_071_744, 4_013_034, marks=pytest.mark.slow)])
def test_at_paper_size_the_costs_are_those_of_the_small_dense_network(name, fields, macs, params):
    """ResNet-18 and the released VGG-16 at 32x32, r = 1/2, the hidden layers of its head whole."""
    cfg = configs.default(model=name).model
    cfg.update(dict(num_experts=1, model_scale=1.0) | fields)
    net = network.make(cfg, (32, 32, 3), 10)
    paths = {spec.path for spec in net.layers if len(spec.kernel) == 4 and "classifier" not in spec.path}
    kept = {path: np.arange(len_of) < len_of // 2 for path, len_of in (
        (spec.path, spec.width) for spec in net.layers) if path in paths}
    assert {path for of in streams.streams(net.layers, paths).values() for path in of} == paths
    found = {f"{path}/kernel": np.asarray(mask) for path, mask in streams.spanning(net.layers, kept).items()}
    masks = masking.cover_norms(masking.of_leaves(net.shapes["params"], found), net.shapes["params"], net.layers)
    costs = net.costs(masks)
    assert (costs["pathway"], costs["params"]) == (macs, params)


def test_what_is_left_computes_what_the_narrower_network_does():
    """Every array without what is masked is one of it, norms with statistics too."""
    net, _, _, masks = _masked("resnet")
    narrow, variables = _net("resnet", 0.5), jax.device_get(jax.jit(net.init)(jax.random.key(0)))
    variables = jax.tree.map(lambda leaf: leaf + np.random.default_rng(leaf.size).uniform(0, 0.5, leaf.shape).astype(
        np.float32), variables)
    of_leaf = tree.named_leaves(masks)

    def left(path, leaf):
        name = tree.path_name(path)
        mask = of_leaf.get(name, of_leaf.get(f"{name.rpartition('/')[0]}/scale"))
        if mask is None:
            return leaf
        mask = np.broadcast_to(mask, leaf.shape) != 0
        axes = [mask.any(tuple(j for j in range(mask.ndim) if j != i)) for i in range(mask.ndim)]
        return leaf[np.ix_(*axes)]

    compact = {part: jax.tree_util.tree_map_with_path(left, of) for part, of in variables.items()}
    assert tree.first_difference(narrow.shapes, compact) is None
    x = jax.random.uniform(jax.random.key(1), (5, *SHAPE))
    masked = {**variables, "params": masking.apply(variables["params"], masks)}
    ours, _ = jax.jit(net.apply)(masked, x)
    theirs, _ = jax.jit(narrow.apply)(compact, x)
    assert np.ptp(theirs) > 1e-2
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(np.abs(theirs).max()))


@pytest.mark.slow
def test_layers_whose_outputs_are_added_lose_the_same_channels():
    """Those of the largest scores, all their filters added; and these get the gradient of everything that goes."""
    net, how, scores, masks = _masked("resnet")
    written = streams.streams(net.layers, {spec.path for spec in how.searched})
    together = next(paths for paths in written.values() if "backbone/conv1" in paths)
    assert set(together) == {"backbone/conv1", "backbone/layer1_0/conv2"}
    sums = sum(np.abs(scores[f"{path}/kernel"]).sum((0, 1, 2)) for path in together)
    expected = np.isin(np.arange(8), np.argsort(-sums)[:4])
    kernel = {path: np.asarray(tree.named_leaves(masks)[f"{path}/kernel"])[0, 0] for path in (
        *together, "backbone/layer1_0/conv1")}
    assert all(np.array_equal(kernel[path][-1] if path == together[0] else kernel[path].any(0), expected)
               for path in together)
    assert np.array_equal(kernel["backbone/layer1_0/conv1"].any(1), expected), "the weights that read them"

    def total(score):
        found = search.soft_masks({"dense": net.shapes["params"], "scores": masking.of_leaves(
            net.shapes["params"], scores | {"backbone/conv1/kernel": score})}, how)
        return sum(jnp.sum(mask) for name, mask in tree.named_leaves(found).items() if name.endswith("kernel"))

    slope = jax.grad(total)(jnp.asarray(scores["backbone/conv1/kernel"]))
    assert np.all(np.abs(slope) >= 1) and np.allclose(np.abs(slope), np.abs(slope)[:1, :1, :1])


@pytest.mark.parametrize("fields, said", [
    (["system.learn_rates=true"], "coupled=true: expected scope layer"), (["system.unit=weight"], "system.unit=filter"),
    (["system.skip=conv"], "can go whole: expected")])
def test_what_cannot_be_searched_is_said_in_a_line(fields, said):
    config = configs.default(system="mask_search")
    configs.override_all(config, ["model.num_experts=1", "model.model_scale=1", "model.depth=6", "model.width=8",
                                  "init_from=base", "system.unit=filter", "system.coupled=true", *fields])
    with pytest.raises(UserError, match=said) as error:
        configs.check(config)
        net = network.make(config.model, SHAPE, CLASSES)
        mask_search.make(config, net, None, None, {"base": Source(None, config, net, {}, {}, 0)})
    assert "\n" not in str(error.value)
