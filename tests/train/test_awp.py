"""Adversarial weight perturbation: beside the algorithm by hand, what it leaves alone, and in a system."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_images
from jax.sharding import AxisType, Mesh

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.systems import adversarial, advmoe, mask_search, standard
from advmoe_jax.train import awp, step
from advmoe_jax.train import state as states
from advmoe_jax.train.system import Inputs

GAMMA, RATE, COUNT = 0.05, 0.1, 8
NUMBERS = np.random.default_rng(0)
X, Y = (NUMBERS.normal(size=(COUNT, size)).astype(np.float32) for size in (5, 3))
W, B, OTHER = (NUMBERS.normal(size=shape).astype(np.float32) for shape in ((5, 3), (3,), (3, 3)))
MASK = (np.arange(15).reshape(5, 3) % 4 > 0).astype(np.float32)


def _objective(state, batch):
    """|x w + b - y o|^2, and the mean of x w among the statistics."""
    a, b = state.params["a"], state.params["b"]
    z = batch["image"] @ a["w"]
    loss = jnp.mean(jnp.sum(jnp.square(z + a["bias"][None] - batch["target"] @ b["w"]), -1))
    mean = 0.5 * state.batch_stats["a"]["mean"] + 0.5 * jnp.mean(z, 0)
    return loss, ({"a": {"mean": mean}, "b": {"seen": jnp.ones(())}}, {})


def _by_hand(w, b, gamma=GAMMA):
    """Loss, new weights, new statistics, step by step in float64."""
    def slopes(w, b):
        error = X @ w + b - Y @ OTHER
        return np.mean(np.sum(error**2, 1)), 2 * X.T @ error / COUNT, 2 * error.mean(0)

    w, b = (w * MASK).astype(np.float64), b.astype(np.float64)
    _, g, _ = slopes(w, b)
    moved = w + gamma * np.linalg.norm(w) * (g * MASK) / np.linalg.norm(g * MASK)
    loss, g, g_b = slopes(moved, b)
    return loss, (w - RATE * g) * MASK, b - RATE * g_b, 0.5 * (X @ moved).mean(0)


@functools.cache
def _stepped(perturb=awp.make(GAMMA), parts=1, devices=1, step_number=0):
    mesh = Mesh(np.array(jax.devices()[:devices]), (meshes.AXIS,), axis_types=(AxisType.Auto,))
    optimizers = {"a": optax.sgd(RATE)}
    variables = {"params": {"a": {"w": W, "bias": B}, "b": {"w": OTHER}},
                 "batch_stats": {"a": {"mean": np.zeros(3, np.float32)}, "b": {"seen": np.zeros((), np.float32)}}}
    state = states.fresh(variables, optimizers, {"a": {"w": MASK, "bias": None}}).replace(step=jnp.int32(step_number))
    of = step.make("train", _objective, None, Inputs("a", "a", "a"), owns=("a",), optimizers=optimizers, state=state,
                   mesh=mesh, parts=parts, perturb=perturb)
    batch = {"image": X, "target": Y, "label": np.zeros(COUNT, np.int32)}
    return jax.device_get(of.update(jax.device_put(state, meshes.replicated(mesh)),
                                    jax.device_put(batch, meshes.by_example(mesh))))


def test_a_step_is_that_of_the_algorithm():
    """Kernels alone are moved; the statistics are those at the moved weights; the other group stays, bit by bit."""
    state, metrics = _stepped()
    loss, w, b, mean = _by_hand(W, B)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(state.params["a"]["w"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params["a"]["bias"], b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.batch_stats["a"]["mean"], mean, rtol=1e-4, atol=1e-6)
    assert np.all(state.params["a"]["w"][MASK == 0] == 0)
    np.testing.assert_array_equal(state.params["b"]["w"], OTHER)
    assert state.batch_stats["b"]["seen"] == 0
    assert loss > _by_hand(W, B, 0)[0] * 1.05 and not np.allclose(mean, _by_hand(W, B, 0)[3], rtol=1e-2)


def test_masked_weights_are_not_moved():
    params = {"a": {"w": jnp.asarray(W * MASK), "bias": jnp.asarray(B)}}
    state = states.fresh({"params": params}, {}, {"a": {"w": MASK, "bias": None}})
    moved = awp.make(GAMMA)(state, params, lambda: jax.tree.map(jnp.ones_like, params))["a"]
    assert np.all(moved["w"][MASK == 0] == 0) and np.all((moved["w"] != W)[MASK == 1])
    np.testing.assert_array_equal(moved["bias"], B)
    assert jnp.linalg.norm(moved["w"] - W * MASK) == pytest.approx(GAMMA * np.linalg.norm(W * MASK), rel=1e-5)
    still = awp.make(GAMMA)(state, params, lambda: jax.tree.map(jnp.zeros_like, params))["a"]["w"]
    np.testing.assert_array_equal(still, W * MASK)


def test_parts_and_devices():
    """The gradient that moves the weights is that of the whole batch; statistics follow one another."""
    whole, parts = _stepped()[0], _stepped(parts=2)[0]
    chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5)
    assert not np.allclose(parts.batch_stats["a"]["mean"], whole.batch_stats["a"]["mean"])
    chex.assert_trees_all_close(_stepped(parts=2, devices=4), _stepped(parts=2), rtol=1e-5)


def test_it_begins_later():
    late = awp.make(GAMMA, 3)
    chex.assert_trees_all_close(_stepped(late, step_number=2), _stepped(None, step_number=2), rtol=1e-6)
    chex.assert_trees_all_close(_stepped(late, step_number=3), _stepped(step_number=3), rtol=1e-6)


def _config(system, *texts):
    config = configs.default(system=system)
    configs.override_all(config, ["model.depth=4", "model.width=4", "train.length=10 steps", "data.batch_size=16",
                                  "system.loss=madry", "train.attack=rotation(limit=0)", "data.pad=0",
                                  "data.flip=false", *texts])
    return config


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_resnet")
@pytest.mark.parametrize("system, which", [("standard", 0), ("advmoe", 0), ("advmoe", 1)])
def test_in_a_system(system, which):
    """Loss and statistics are those at the moved weights, and the weights go down the gradient there."""
    dense = ("model.num_experts=1",) if system == "standard" else ("model.router_width=4", "model.num_experts=2")
    config, mesh, data = _config(system, "system.awp=0.01", *dense), meshes.make(), random_images.data(16)
    net = network.make(config.model, data.image_shape, data.num_classes)
    made = {"standard": standard, "advmoe": advmoe}[system].make(config, net, data, mesh, {})
    of, state = made.steps[which], made.init(jax.random.key(0))
    ready = of.prepare(state, pipeline.device_batch(mesh, data.train, np.arange(16)), of.inputs)
    at = jax.device_get(state)
    after, metrics = jax.device_get(of.update(state, ready))
    run = adversarial.objective(net, config, router_loss=of.name == "lower")

    @jax.jit
    def slope(owned):
        return jax.value_and_grad(lambda p: run(at.replace(params=at.params | p), ready), has_aux=True)(owned)

    owned = {group: at.params[group] for group in of.owns}
    _, grads = slope(owned)
    moved = jax.tree.map(lambda w, g: w if w.ndim < 2 else w + 0.01 * np.linalg.norm(w) * g / np.linalg.norm(g),
                         owned, grads)
    (loss, (stats, _)), grads = slope(moved)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
    for group, rest in at.params.items():
        if group not in of.owns:
            chex.assert_trees_all_equal(after.params[group], rest)
            chex.assert_trees_all_equal(after.batch_stats[group], at.batch_stats[group])
            continue
        chex.assert_trees_all_close(after.batch_stats[group], stats[group], rtol=1e-3, atol=1e-5)
        if system == "standard":
            rate, decay = config.optim.backbone.learning_rate, config.optim.backbone.weight_decay
            for name, leaf in tree.named_leaves(after.params[group]).items():
                w, g = (tree.named_leaves(of[group])[name] for of in (at.params, grads))
                np.testing.assert_allclose(leaf, w - rate * (g + decay * w), rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("tiny_resnet")
def test_refused():
    data = random_images.data(16)
    net = network.make(_config("standard", "model.num_experts=1").model, data.image_shape, data.num_classes)
    with pytest.raises(UserError, match="system.awp_from is '10 steps', iteration 10: expected one before the end"):
        standard.make(_config("standard", "model.num_experts=1", "system.awp=0.005", "system.awp_from=10 steps"), net,
                      data, meshes.make(), {})
    with pytest.raises(UserError, match="system.awp is 0.005: expected 0 with system.name=mask_search"):
        mask_search.make(_config("mask_search", "model.num_experts=1", "system.awp=0.005"), net, data, meshes.make(),
                         {})
    for texts, says in ((("system.awp_from=1 epochs",), "it is for system.awp above 0"),
                        (("system.mixup=0.2", "system.cutmix=1"), "it is for system.mixup 0")):
        with pytest.raises(UserError, match=says):
            configs.check(_config("standard", "model.num_experts=1", *texts))
