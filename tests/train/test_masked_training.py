"""Nothing that is masked ever comes back: not through momentum, weight decay, Adam, a checkpoint or other devices.

A tiny ResNet on random images, by the standard system, with irregular masks and masks of whole channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_images
from jax.sharding import AxisType, Mesh

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.ops import masks as masking
from advmoe_jax.systems import standard
from advmoe_jax.train import checkpoint, loop
from advmoe_jax.train import state as states

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH, STEPS = (8, 8, 1), 4, 64, 16, 4
DATA = random_images.data(COUNT)
OPTIMIZERS = {
    "sgd": ("optim.backbone.momentum=0.9", "optim.backbone.weight_decay=0.1"),
    "adam": ("optim.backbone.optimizer=adam", "optim.backbone.weight_decay=0.1", "optim.backbone.learning_rate=0.01"),
    "adamw": ("optim.backbone.optimizer=adamw", "optim.backbone.weight_decay=0.1", "optim.backbone.learning_rate=0.01")}


@functools.cache
def _config(optimizer):
    config = configs.default(system="standard", data="digits")
    for text in ("model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=8", "system.loss=natural",
                 f"data.batch_size={BATCH}", f"train.length={STEPS} steps", "train.save_every=2 steps",
                 "train.eval_every=0 steps", "optim.backbone.schedule=constant", *OPTIMIZERS[optimizer]):
        configs.override(config, text)
    return config


def _masks(net, params, whole_channels):
    """{group: tree}: half of every convolution's entries, or half of its channels with the norms behind them."""
    numbers = np.random.default_rng(1)

    def mask(path, leaf):
        if not path.endswith("kernel") or leaf.ndim != 4:
            return None
        shape = (1, 1, 1, leaf.shape[-1]) if whole_channels else leaf.shape
        return jnp.asarray(numbers.permutation(np.arange(np.prod(shape)) % 2).reshape(shape), jnp.float32)

    names = iter(tree.named_leaves(params))
    found = jax.tree.map(lambda leaf: mask(next(names), leaf), params)
    return masking.cover_norms(found, params, net.layers) if whole_channels else found


def _system(optimizer, whole_channels, devices):
    """The standard system, whose state has masks, and arrays of its own."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (meshes.AXIS,), axis_types=(AxisType.Auto,))
    config = _config(optimizer)
    net = network.make(config.model, SHAPE, CLASSES, mesh)
    system = standard.make(config, net, DATA, mesh, {})

    def init(key):
        state = system.init(key)
        masked = states.masked(state.replace(masks=_masks(net, state.params, whole_channels),
                                             extra={"dual": {"a": jnp.arange(3.)}}))
        return jax.device_put(masked, meshes.replicated(mesh))

    return dataclasses.replace(system, init=init), config, mesh


def _train(system, config, mesh, workdir):
    workdir.mkdir(exist_ok=True)
    return jax.device_get(loop.run(config, workdir, system, DATA.train, lambda state: (0.0, 0.0), mesh))


def _assert_masked(state, before):
    """Zeros stay, all else moves, the masks rest."""
    flat, moved = tree.named_leaves(state.params), 0
    kept = tree.named_leaves(state.masks)
    assert len(kept) >= 3
    for name, mask in kept.items():
        full = np.broadcast_to(mask, flat[name].shape)
        assert 0.2 < full.mean() < 0.8 and np.all(flat[name][full == 0] == 0), name
        moved += np.mean(flat[name][full != 0] != tree.named_leaves(before.params)[name][full != 0])
    assert moved > 0.9 * len(kept)
    for ours, theirs in zip(jax.tree.leaves(state.masks), jax.tree.leaves(before.masks), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(state.extra["dual"]["a"], [0, 1, 2])


@pytest.mark.parametrize("optimizer, whole_channels, devices", [
    ("sgd", False, 1), ("sgd", True, 4), ("adam", True, 1), ("adamw", False, 4)])
def test_nothing_masked_returns(optimizer, whole_channels, devices, tmp_path):
    system, config, mesh = _system(optimizer, whole_channels, devices)
    before = jax.device_get(system.init(rng.key(config.seed, "init")))
    _assert_masked(_train(system, config, mesh, tmp_path / "w"), before)


def test_a_state_begins_masked():
    """Whatever the parameters were; NaN under a mask is removed too."""
    params = {"backbone": {"w": jnp.array([1., jnp.nan, 3.]), "b": jnp.ones(2)}, "router": {"w": jnp.ones(3)}}
    masks = {"backbone": {"w": jnp.array([1., 0., 0.]), "b": None}}
    state = states.fresh({"params": params}, {"backbone": optax.sgd(0.1, 0.9)}, masks, {"dual": jnp.ones(2)})
    np.testing.assert_array_equal(state.params["backbone"]["w"], [1, 0, 0])
    np.testing.assert_array_equal(state.params["backbone"]["b"], [1, 1])
    np.testing.assert_array_equal(state.params["router"]["w"], [1, 1, 1])
    assert state.masks is masks and state.extra["dual"].tolist() == [1, 1]


def test_the_masks_of_a_state_may_change():
    """As a schedule of pruning does: what is removed then is zero at once after the next step, whatever it was."""
    system, _, mesh = _system("sgd", False, 1)
    state = system.init(rng.key(0, "init"))
    fewer = jax.tree.map(lambda mask: mask * (np.arange(mask.shape[-1]) % 3 > 0), jax.device_get(state.masks))
    state = state.replace(masks=jax.device_put(fewer, meshes.replicated(mesh)))
    gone = {name: np.broadcast_to(mask, tree.named_leaves(state.params)[name].shape) == 0
            for name, mask in tree.named_leaves(fewer).items()}
    before = tree.named_leaves(jax.device_get(state.params))
    assert all(np.any(before[name][where] != 0) for name, where in gone.items())
    [step] = system.steps
    batch = pipeline.device_batch(mesh, DATA.train, np.arange(BATCH))
    state, _ = step.update(state, step.prepare(state, batch, step.inputs))
    after = tree.named_leaves(jax.device_get(state.params))
    assert all(np.all(after[name][where] == 0) for name, where in gone.items())


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_nothing_masked_returns_after_a_kill(optimizer, tmp_path, monkeypatch):
    """And the end is the same, bit by bit, on the masks of the checkpoint."""
    system, config, mesh = _system(optimizer, True, 1)
    before = jax.device_get(system.init(rng.key(config.seed, "init")))
    whole = _train(system, config, mesh, tmp_path / "whole")

    def killed(system, state, step, *more):
        if step == 3:
            raise _Killed
        return iterate(system, state, step, *more)

    iterate = loop.iterate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "iterate", killed)
        with pytest.raises(_Killed):
            _train(system, config, mesh, tmp_path / "killed")
    state = _train(system, config, mesh, tmp_path / "killed")
    _assert_masked(state, before)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_masks_come_back_with_what_was_trained(tmp_path):
    """As an evaluation and other runs read a checkpoint: without the optimizer's state."""
    system, config, mesh = _system("sgd", True, 1)
    state = _train(system, config, mesh, tmp_path / "w")
    with checkpoint.opened(tmp_path / "w", create=False) as saved:
        trained = saved.restore_trained("last", jax.eval_shape(system.model.init, jax.random.key(0)))
    for ours, theirs in ((trained.masks, state.masks), (trained.variables["params"], state.params)):
        ours, theirs = tree.named_leaves(ours), tree.named_leaves(theirs)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    dense, pruned = system.model.costs(), system.model.costs(trained.masks)
    assert 0.3 < pruned["params"] / dense["params"] < 0.7 and pruned["pathway"] < 0.7 * dense["pathway"]


def test_removed_channels_are_not_seen():
    """What the next layer would read of them is zero, whatever its weights."""
    system, config, mesh = _system("sgd", True, 1)
    state = jax.device_get(system.init(rng.key(0, "init")))
    model, x = system.model, np.random.default_rng(2).uniform(size=(3, *SHAPE)).astype(np.float32)
    logits, _ = model.outputs_fn(state.variables)(x)
    gone = np.ravel(state.masks["backbone"]["layer1_0"]["conv1"]["kernel"]) == 0
    block = state.params["backbone"]["layer1_0"]
    other = np.array(block["conv2"]["kernel"])
    other[:, :, gone] = 1e3
    params = {"backbone": state.params["backbone"] | {"layer1_0": block | {"conv2": {"kernel": other}}}}
    again, _ = model.outputs_fn({"params": params, "batch_stats": state.batch_stats})(x)
    assert gone.any()
    np.testing.assert_array_equal(again, logits)
