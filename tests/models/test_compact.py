"""The compact form of a masked network: the same function, counted, trained, attacked and saved as any network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import dotted
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Arrays
from advmoe_jax.evaluation import suites
from advmoe_jax.models import cifar_resnet, compact, network, vgg
from advmoe_jax.models import model as models
from advmoe_jax.models.layers import GatheredConv
from advmoe_jax.models.model import Computing
from advmoe_jax.pruning import channels, paper_macs, pruned, srgkp
from advmoe_jax.systems import standard
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import checkpoint, loop

SHAPE, CLASSES, BATCH = (8, 8, 1), 4, 16
BASES = {"cifar_resnet": ("model.depth=8",), "vgg": ("model.depth=4",)}


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    """A ResNet of two blocks and a VGG of three convolutions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar_resnet, "_STAGES", 2)
        patch.setitem(vgg.DEPTHS, "4", (1, 1, 1))
        yield


def _config(*overrides, base="cifar_resnet"):
    config = configs.default(model="compact", system="standard")
    configs.override_all(config, [
        f"model.base={base}", "model.num_experts=1", "model.model_scale=1", *BASES[base], "model.width=8",
        "model.groups=4", "model.rate=1/2", "system.loss=natural", f"data.batch_size={BATCH}", "data.pad=0",
        "data.flip=false", "train.length=2 steps", "optim.backbone.schedule=constant", *overrides])
    return config


def _net(config):
    return models.make(config.model, SHAPE, CLASSES)


@functools.cache
def _masked(base="cifar_resnet"):
    """A dense network with statistics of its own, pruned by SR-GKP."""
    config = _config(base=base)
    dense, numbers = network.make(config.model, SHAPE, CLASSES, name=base), np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: (
        numbers.normal(size=leaf.shape) / 4 if len(leaf.shape) > 1 else numbers.uniform(0.5, 1.5, leaf.shape)
    ).astype(np.float32), dense.shapes)
    subject = pruned.of(lambda variables, x: dense.apply(variables, x)[0], variables, dense.layers, "1/2")
    return dense, pruned.choose(subject, "srgkp", srgkp.Config(groups=4))


@functools.cache
def _compact(base="cifar_resnet"):
    """The same network in its compact form, and its variables."""
    net, of = _net(_config(base=base)), _masked(base)[1]
    return net, compact.from_masked(net, of.variables, of.plan)


def _images():
    return jax.random.uniform(jax.random.key(1), (BATCH, *SHAPE))


def _outputs(net, variables):
    """Logits, and the gradient of their weighted sum to the images."""
    def weighted(x):
        logits = net.apply(variables, x)[0]
        return jnp.sum(logits @ jnp.arange(1.0, CLASSES + 1)), logits

    slope, logits = jax.jit(jax.grad(weighted, has_aux=True))(_images())
    return logits, slope


@pytest.mark.parametrize("base, form", [
    ("cifar_resnet", None), pytest.param("cifar_resnet", "grouped", marks=pytest.mark.slow),
    pytest.param("vgg", None, marks=pytest.mark.slow)])
def test_it_is_the_function_of_the_masked_network(base, form):
    """Gradients to images too; norms and biases are unchanged."""
    dense, of = _masked(base)
    net, variables = _compact(base)
    for ours, theirs in zip(_outputs(compact.computed_by(net, form), variables), _outputs(dense, of.variables)):
        assert np.abs(theirs).max() > 1e-2
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    before, after = tree.named_leaves(of.variables), tree.named_leaves(variables)
    shared = [name for name in before if before[name].shape == after[name].shape]
    assert len(shared) > len(before) / 2
    for name in shared:
        np.testing.assert_array_equal(before[name], after[name])
    assert tree.first_difference(net.shapes, variables) is None


def test_it_costs_what_the_masked_network_costs():
    dense, of = _masked()
    net, _ = _compact()
    ours, theirs = net.costs(), dense.costs(of.masks)
    assert ours == theirs | {"executed": ours["total"]} and ours["total"] < theirs["executed"]
    sizes, of_dense = ({name: leaf.shape for name, leaf in tree.named_leaves(of.shapes["params"]).items()}
                       for of in (net, dense))
    assert paper_macs.count(net.layers, sizes) == paper_macs.count(dense.layers, of_dense, of.masks)
    assert net.kind == "compact Dense" and (net.groups, net.views) == (dense.groups, dense.views)
    for spec, other in zip(net.layers, dense.layers, strict=True):
        assert (spec.path, spec.norm, spec.inputs, spec.join) == (other.path, other.norm, other.inputs, other.join)


def test_resnet20_has_the_structure_of_the_paper(monkeypatch):
    """SR-GKP at 7/16 in 8 groups: kernels, indices, and the exact figures of its counter."""
    monkeypatch.setattr(cifar_resnet, "_STAGES", 3)
    config = configs.default(model="compact", system="standard")
    configs.override_all(config, ["model.num_experts=1", "model.model_scale=1"])
    net = models.make(config.model, (32, 32, 3), 10)
    specs = {spec.path: spec for spec in net.layers}
    stats = tree.named_leaves(net.shapes["batch_stats"])
    for path, shape in (("layer1_0/conv1", (3, 3, 9, 16)), ("layer2_0/conv1", (3, 3, 9, 32)),
                        ("layer2_0/conv2", (3, 3, 18, 32)), ("layer3_0/conv1", (3, 3, 18, 64)),
                        ("layer3_2/conv2", (3, 3, 36, 64))):
        spec = specs[f"backbone/{path}"]
        assert (spec.kernel, spec.groups, spec.is_gathered) == (shape, 8, True)
        found = [stats[f"backbone/{path}/{name}"] for name in ("inputs", "outputs")]
        assert [leaf.shape for leaf in found] == [(8 * shape[2],), (shape[3],)]
        assert {leaf.dtype for leaf in found} == {jnp.dtype("int32")}
    assert sum(spec.is_gathered for spec in net.layers) == 18 and not specs["backbone/conv1"].is_gathered
    sizes = {name: leaf.shape for name, leaf in tree.named_leaves(net.shapes["params"]).items()}
    pools = (*paper_macs.shortcut_pools(net.layers), paper_macs.last_pool(net.layers))
    assert paper_macs.count(net.layers, sizes, pools=pools) == {"macs": 23_390_858, "params": 152_794}


def test_fresh_groups_read_every_channel():
    found = jax.jit(GatheredConv(8, 6, 4).init)(jax.random.key(0), jnp.zeros((1, 1, 1, 9)))["batch_stats"]
    read = found["inputs"].reshape(4, 6).tolist()
    assert all(len(set(of_group)) == 6 for of_group in read) and {*sum(read, [])} == {*range(9)}
    assert read[0] != read[1] and found["outputs"].tolist() == [*range(8)]


def test_nothing_depends_on_the_default_precision():
    net = _compact()[0]
    with jax.enable_x64(True):
        found = jax.eval_shape(net.init, jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, net.shapes)
    lowered = net.in_training(Computing(precision="bfloat16", remat=True))
    x = jax.ShapeDtypeStruct((2, 2, *SHAPE), jnp.float32)
    logits, _, stats = jax.eval_shape(lowered.train_pass, net.shapes, x)
    assert logits.dtype == jnp.float32
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), stats) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), net.shapes["batch_stats"])


def _mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), (meshes.AXIS,), axis_types=(AxisType.Auto,))


def _system(devices, *overrides):
    numbers = np.random.default_rng(0)
    split = Arrays(numbers.integers(0, 256, (2 * BATCH, *SHAPE)).astype(np.uint8),
                   numbers.integers(0, CLASSES, 2 * BATCH).astype(np.int32))
    data = pipeline.Data(split, np.arange(2 * BATCH), split, np.arange(4), split, CLASSES, SHAPE)
    (net, variables), config, mesh = _compact(), _config(*overrides), _mesh(devices)
    source = {"base": Source(None, config, net, variables, {}, 0)}
    return standard.make(config, net, data, mesh, source), mesh, data


def _same_indices(found, expected):
    found, expected = (tree.named_leaves(of) for of in (found, expected))
    names = [name for name in expected if name.endswith(("inputs", "outputs"))]
    assert len(names) == 8
    for name in names:
        assert found[name].dtype == np.int32
        np.testing.assert_array_equal(found[name], expected[name])


def test_it_is_trained_and_its_indices_rest(tmp_path):
    """From the masked network on, with an average of the weights; saved by 4 devices, read by 1 and by none."""
    system, mesh, data = _system(4, "train.ema=0.9")
    state, before = system.init(rng.key(0, "init")), _compact()[1]
    for step in range(2):
        state, metrics = loop.iterate(system, state, step, 2, lambda _, step=step: pipeline.device_batch(
            mesh, data.train, np.arange(BATCH) + BATCH * step))
    assert np.isfinite(metrics["train/loss"])
    kernel = state.params["backbone"]["layer1_0"]["conv1"]["kernel"]
    assert np.mean(np.asarray(kernel) != before["params"]["backbone"]["layer1_0"]["conv1"]["kernel"]) > 0.9
    mean = state.batch_stats["backbone"]["layer1_0"]["bn1"]["mean"]
    assert np.all(np.asarray(mean) != before["batch_stats"]["backbone"]["layer1_0"]["bn1"]["mean"])
    _same_indices(state.batch_stats, before["batch_stats"])
    _same_indices(state.extra["ema"]["batch_stats"], before["batch_stats"])
    with checkpoint.opened(tmp_path) as saved:
        saved.save("last", 2, state, {})
    alone, one, _ = _system(1, "train.ema=0.9")
    with checkpoint.opened(tmp_path, create=False) as saved:
        restored = saved.restore_newest(loop.abstract_state(alone, one), pytest.fail)
        for which in ("last", "ema"):
            _same_indices(saved.restore_trained(which, alone.model.shapes).variables["batch_stats"],
                          before["batch_stats"])
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert len(ours.devices()) == 1 and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_it_is_attacked():
    net, variables = _compact()
    x, outputs_fn = _images(), net.outputs_fn(variables)
    y = jnp.argmax(outputs_fn(x)[0], -1)
    [spec] = suites.together("pgd(num_steps=2)", "linf", "0.3").specs
    x_adv = spec.run(jax.tree_util.Partial(lambda variables, x: net.outputs_fn(variables)(x)[0], variables),
                     jax.random.key(0), x, y)
    assert 0 < jnp.abs(x_adv - x).max() <= 0.3 + 1e-6

    def right(x):
        return jnp.take_along_axis(jax.nn.log_softmax(outputs_fn(x)[0]), y[:, None], -1).mean()

    assert right(x_adv) < right(x)


def test_it_is_not_pruned_again():
    """The channels of a group are its own: masks for a plain grouped convolution would remove others."""
    net, variables = _compact()
    with pytest.raises(UserError, match="no 3x3 convolution inside a block"):
        pruned.of(lambda variables, x: net.apply(variables, x)[0], variables, net.layers, "1/2")
    plain = _net(_config("model.rate=3/4"))  # as many inputs in all groups as the layer has
    assert any(spec.is_gathered and spec.kernel[2] * spec.groups == 8 for spec in plain.layers)
    assert not channels.removable(plain.layers, True)


@pytest.mark.parametrize("override, said", [
    ("model.num_experts=2", "model.num_experts is 2: expected 1 with model.name=compact"),
    ("model.rate=1/3", "backbone/layer1_0/conv1: the channels that model.rate 1/3 keeps: 2/3 of 8 is 5.33333"),
    ("model.rate=1", "model.rate is '1': expected more than 0 and less than 1"),
    ("model.groups=3", "layer1_0/conv1: model.groups is 3: expected a divisor of the layer's 8 filters"),
    ("model.kernels=5x5", "unknown model.kernels '5x5'"),
    ("model.base=ensemble", "unknown model.base 'ensemble'")])
def test_what_cannot_be_compact(override, said):
    with pytest.raises(UserError) as error:
        config = _config(override)
        configs.check(config)
        _net(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def _changed(plan, **changes):
    path = "backbone/layer1_0/conv1"
    return {**plan, path: {**plan[path], **changes}}


@pytest.mark.parametrize("change, said", [
    (lambda plan: {}, "the plan has no order of the filters of backbone/layer1_0/conv1"),
    (lambda plan: _changed(plan, kept=[[0, 1, 2]] * 4), r"conv1 keeps [3] input channels in 4 groups: expected 4 in 4"),
    (lambda plan: _changed(plan, order=[0] * 8), "conv1 has a kernel (3, 3, 8, 8), of which this is no plan"),
    (lambda plan: _changed(plan, kept=[[0, 1, 2, 9]] * 4), "of which this is no plan"),
    (lambda plan: _changed(plan, order=plan["backbone/layer1_0/conv1"]["order"][::-1]), "weights that the plan removes")
])
def test_plans_of_another_network(change, said):
    of = _masked()[1]
    with pytest.raises(UserError) as error:
        compact.from_masked(_compact()[0], of.variables, change(of.plan))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_plan_as_pruning_json_has_it():
    net, variables = _compact()
    of = _masked()[1]
    found = compact.from_masked(net, of.variables, {dotted(path): layer for path, layer in of.plan.items()})
    jax.tree.map(np.testing.assert_array_equal, found, variables)
