"""Weights that are products of two, and the mask that comes in the middle of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_images

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.systems import adversarial, twin_rep
from advmoe_jax.train import checkpoint, loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH, STEPS, AT = (8, 8, 1), 4, 16, 8, 5, 2
DATA = random_images.data(COUNT)
RATE, DECAY, LEARNING_RATE = 0.6, 0.1, 0.05


def _config(*overrides):
    config = configs.default(system="twin_rep")
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=4", f"data.batch_size={BATCH}",
        f"train.length={STEPS} steps", "system.loss=natural", f"system.rate={RATE}", "system.prune_after=40%",
        "optim.backbone.schedule=constant", f"optim.backbone.learning_rate={LEARNING_RATE}",
        f"optim.backbone.weight_decay={DECAY}", "data.pad=0", "data.flip=false", *overrides])
    return config


def _made(*overrides):
    config = _config(*overrides)
    configs.check(config)
    return twin_rep.make(config, network.make(config.model, SHAPE, CLASSES), DATA, meshes.make(), {})


_system = functools.cache(_made)


def _train(system, state, first):
    """The state after each iteration from `first` on."""
    mesh, found = meshes.make(), []
    for step in range(first, system.length):
        rows = np.arange(BATCH) + BATCH * (step % 2)
        state, _ = loop.iterate(system, state, step, 2, lambda _, rows=rows: pipeline.device_batch(
            mesh, DATA.train, rows))
        found.append(jax.device_get(state))
    return found


@functools.cache
def _run():
    """The state before the first step, with a linear layer that no mask empties so early, then those after each."""
    state = _system().init(rng.key(0, "init"))
    twins = state.extra["twins"]["backbone"]
    linear = {"linear": {"kernel": 100 * twins["w"]["linear"]["kernel"], "bias": twins["w"]["linear"]["bias"]}}
    state = twin_rep._put(state, {"backbone": twins | {"w": twins["w"] | linear}})
    first = jax.device_get(state)
    return first, *_train(_system(), jax.device_put(first, meshes.replicated(meshes.make())), 0)


def _kernels(state):
    return {path: leaf for path, leaf in tree.named_leaves(state.params).items() if path.endswith("kernel")}


def _twins(state, name):
    return tree.named_leaves({group: of[name] for group, of in state.extra["twins"].items()})


def _same(ours, theirs):
    ours, theirs = tree.named_leaves(ours), tree.named_leaves(theirs)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_weights_begin_as_products():
    first = jax.device_get(_system().init(rng.key(0, "init")))
    w, a = _twins(first, "w"), _twins(first, "a")
    plain = tree.named_leaves(jax.device_get(jax.jit(_system().model.init)(
        rng.stream(rng.key(0, "init"), "params")))["params"])
    assert w.keys() == plain.keys() and a.keys() == _kernels(first).keys() and len(a) == 4
    assert all(np.allclose(w[path], plain[path], rtol=1e-5, atol=1e-7) for path in plain), "w as the model begins"
    for path, kernel in _kernels(first).items():
        most = 1 / np.sqrt(np.prod(kernel.shape[:-1]))
        assert 0.8 * most < np.abs(a[path]).max() <= most and abs(a[path].mean()) < 0.3 * most
        np.testing.assert_allclose(kernel, w[path] * a[path], rtol=1e-6)
    assert len({float(of.ravel()[0]) * np.sqrt(np.prod(of.shape[:-1])) for of in a.values()}) == 4, "each is drawn"


def test_parameters_are_masked_products_at_all_times():
    masks = [tree.named_leaves(state.masks) for state in _run()]
    for step, (state, mask) in enumerate(zip(_run(), masks)):
        w, a = _twins(state, "w"), _twins(state, "a")
        for path, leaf in tree.named_leaves(state.params).items():
            np.testing.assert_allclose(leaf, w[path] * a[path] * mask[path] if path in a else w[path], rtol=1e-6)
        assert mask.keys() == a.keys() and all(np.all(of) for of in mask.values()) == (step < AT)
    assert _system().first_best == AT


def test_the_smallest_of_all_layers_go_once():
    """By hand, sorted one by one; the twins of what went still move, and nothing comes back."""
    states = _run()
    w, a = _twins(states[AT], "w"), _twins(states[AT], "a")
    places = sorted((-abs(float(w[path].flat[i] * a[path].flat[i])), number, i) for number, path in enumerate(a)
                    for i in range(a[path].size))
    kept = {place[1:] for place in places[:len(places) - int(RATE * len(places) + 1e-6)]}
    for state in states[AT:]:
        for number, (path, mask) in enumerate(tree.named_leaves(state.masks).items()):
            assert [(number, i) in kept for i in range(mask.size)] == mask.ravel().tolist()
            assert not np.any(_kernels(state)[path][~mask])
    gone = [~mask for mask in tree.named_leaves(states[-1].masks).values()]
    for name in "wa":
        before, after = _twins(states[AT], name), _twins(states[-1], name)
        assert all(np.any(before[path][of] != after[path][of]) for path, of in zip(a, gone)), "momentum and decay"
    shares = [1 - of.mean() for of in gone]
    assert max(shares) > 1.2 * min(shares) and max(shares) < 1, "layers keep what is large"


@pytest.mark.parametrize("at", [0, AT])
def test_an_update_is_that_of_both_twins(at):
    """The gradient of w is that of the product times a, and the other way round, where the mask keeps it."""
    system, mesh = _system(), meshes.make()
    before, [step] = _run()[at], system.steps
    before = before.replace(opt=jax.tree.map(np.zeros_like, before.opt))  # no momentum
    state = jax.device_put(before, meshes.replicated(mesh))
    batch = step.prepare(state, pipeline.device_batch(mesh, DATA.train, np.arange(BATCH)), step.inputs)
    objective = adversarial.objective(system.model, _config())
    slopes = tree.named_leaves(jax.device_get(jax.jit(jax.grad(
        lambda params: objective(before.replace(params=params), batch)[0]))(before.params)))
    after = jax.device_get(step.update(state, batch)[0])
    masks = tree.named_leaves(before.masks)
    for name, other in ("wa", "aw"):
        old, new, twin = _twins(before, name), _twins(after, name), _twins(before, other)
        for path in _twins(before, "a"):
            expected = LEARNING_RATE * (slopes[path] * twin[path] * masks[path] + DECAY * old[path])
            np.testing.assert_allclose(old[path] - new[path], expected, rtol=1e-3, atol=1e-6)


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    """And others read of it an ordinary network with its masks."""
    states, system = _run(), _system()
    with checkpoint.opened(tmp_path) as saved:
        saved.save("last", 1, states[1], {})
        restored = saved.restore_newest(loop.abstract_state(system, meshes.make()), print)
    last = _train(system, restored, 1)[-1]
    assert _same(last, states[-1])
    with checkpoint.opened(tmp_path / "end") as saved:
        saved.save("last", STEPS, last, {})
        trained = saved.restore_trained("last", system.model.shapes)
    assert _same(trained.variables["params"], last.params) and _same(trained.masks, last.masks)
    costs = system.model.costs(trained.masks)
    gone = sum(int((~mask).sum()) for mask in tree.named_leaves(last.masks).values())
    assert costs["params"] == system.model.costs()["params"] - gone


def test_an_average_is_updated_beside_the_mask():
    system = _made("train.ema=0.9", "train.length=10 steps", "system.prune_after=10%", "system.rate=0.1")
    assert list(system.every) == ["1 steps"] and system.first_best == 1
    state = system.init(rng.key(0, "init"))
    state = system.every["1 steps"](state.replace(step=jnp.int32(1)))
    masks, before = tree.named_leaves(state.masks), _kernels(system.init(rng.key(0, "init")))
    assert sum(int(np.sum(~mask)) for mask in masks.values()) == sum(mask.size for mask in masks.values()) // 10
    average = tree.named_leaves(state.extra["ema"]["params"])
    for path, kernel in _kernels(state).items():  # after the first step the average keeps 2 / 11 of itself
        np.testing.assert_allclose(average[path], kernel + (2 / 11) * (before[path] - kernel), atol=1e-6)


@pytest.mark.parametrize("overrides, said", [
    (["init_from=base"], "expected nothing with system.name=twin_rep"), (["system.rate=1"], "system.rate is '1'"),
    (["system.prune_after=0%"], "system.prune_after is '0%': expected more"), (["system.skip=."], "no convolution or"),
    (["system.prune_after=late"], "system.prune_after is 'late'"),
    (["system.prune_after=5 steps"], "5 steps: expected less than the 5 of training"),
    (["system.prune_after=100%"], "expected less than the 5 of training")])
def test_bad_input_is_said_in_a_line(overrides, said):
    with pytest.raises(UserError) as error:
        _made(*overrides)
    assert said in str(error.value) and "\n" not in str(error.value)
