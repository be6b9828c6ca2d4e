"""How training computes: its precision, parts of a batch, what is computed again, and the average of the weights."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from advmoe_jax.attacks import driver
from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import model as models
from advmoe_jax.models.model import Computing
from advmoe_jax.train import ema, step
from advmoe_jax.train import state as states
from advmoe_jax.train.system import Inputs

pytestmark = pytest.mark.usefixtures("tiny_resnet")
X = np.random.default_rng(0).uniform(size=(8, 2, 8, 8, 1)).astype(np.float32)


@functools.cache
def _model(dispatch="all"):
    config = configs.default(system="advmoe")
    configs.override_all(config, ["model.depth=4", "model.width=8", "model.router_width=4",
                                  f"model.dispatch={dispatch}"])
    model = models.make(config.model, (8, 8, 1), 4)
    return model, model.init(jax.random.key(0))


def _loss(model, variables, params):
    logits, aux, stats = model.train_pass(variables | {"params": params}, X)
    return jnp.sum(jnp.square(logits)) + jnp.sum(jnp.square(aux["router_logits"])), (logits, aux, stats)


def _slopes(model, variables):
    return jax.jit(jax.value_and_grad(functools.partial(_loss, model, variables), has_aux=True))(variables["params"])


@pytest.mark.parametrize("dispatch", ["all", pytest.param("blocks", marks=pytest.mark.slow)])
def test_bfloat16_is_the_backbones_alone(dispatch):
    """Convolutions of the backbone are bfloat16, those of gradients too; all that is stored or decided is float32."""
    model, variables = _model(dispatch)
    lowered = model.in_training(Computing("bfloat16"))
    program = jax.make_jaxpr(jax.grad(functools.partial(_loss, lowered, variables), has_aux=True))(variables["params"])
    kinds = [equation.outvars[0].aval.dtype for equation in driver.equations(program.jaxpr)
             if equation.primitive.name == "conv_general_dilated"]
    assert len(kinds) > 4 and all(kind == jnp.bfloat16 for kind in kinds)
    (loss, outputs), grads = _slopes(lowered, variables)
    chex.assert_trees_all_equal_dtypes((outputs[:1], outputs[1]["router_logits"], outputs[2]), jax.tree.map(
        jnp.float32, (outputs[:1], outputs[1]["router_logits"], outputs[2])))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, variables["params"])
    (exact, _), _ = _slopes(model, variables)
    assert loss != exact and abs(loss - exact) < 0.05 * exact
    chex.assert_trees_all_equal_dtypes(lowered.outputs_fn(variables)(X[:, 0])[0], jnp.float32(0))


def test_what_is_computed_again_is_the_same():
    model, variables = _model()
    again = model.in_training(Computing(remat=True))
    chex.assert_trees_all_close(_slopes(again, variables), _slopes(model, variables), rtol=1e-5, atol=1e-6)

    def kept(model):
        """Floats that are kept for the gradient."""
        _, pull = jax.eval_shape(lambda p: jax.vjp(lambda p: _loss(model, variables, p)[0], p), variables["params"])
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert kept(again) < 0.7 * kept(model)


def _linear(mesh, parts):
    """Steps of a linear model, whose statistics are means of its batches that follow one another."""
    def objective(state, batch):
        params, stats = state.params, state.batch_stats
        x = batch["image"].reshape(len(batch["image"]), -1)
        mean = 0.5 * stats["a"]["mean"] + 0.5 * jnp.mean(x, 0)
        noise = batch["adversarial"].mean((1, 2, 3, 4))
        loss = jnp.mean(jnp.square((x - jnp.mean(x, 0, keepdims=True)) @ params["a"]["w"] + noise))
        return loss, ({"a": {"mean": mean}}, {"seen": jnp.mean(batch["label"].astype(jnp.float32))})

    def attack(variables, key, x, y, index, count):
        return jnp.clip(x + jax.random.uniform(key) + index[:, None, None, None] / 64, 0, 1)[:, None]

    optimizers = {"a": optax.sgd(0.1)}
    state = states.fresh({"params": {"a": {"w": jnp.arange(4.)}}, "batch_stats": {"a": {"mean": jnp.zeros(4)}}},
                         optimizers)
    data = configs.default().data
    data.pad, data.flip = 0, False
    prepare = step.preparation(attack, seed=0, mesh=mesh, data_cfg=data, parts=parts)
    return step.make("train", objective, prepare, Inputs("a", "a", "a"), owns=("a",), optimizers=optimizers,
                     state=state, mesh=mesh, parts=parts), state


@functools.cache
def _stepped(parts, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), (meshes.AXIS,), axis_types=(AxisType.Auto,))
    of, state = _linear(mesh, parts)
    images = np.random.default_rng(1).integers(0, 256, (16, 2, 2, 1), np.uint8)
    batch = {"image": images, "label": np.arange(16, dtype=np.int32), "index": np.arange(16, dtype=np.int32)}
    ready = of.prepare(jax.device_put(state, meshes.replicated(mesh)),
                       jax.device_put(batch, meshes.by_example(mesh)), of.inputs)
    return jax.device_get((ready, *of.update(jax.device_put(state, meshes.replicated(mesh)), ready)))


def test_parts_of_a_batch():
    """Images and adversaries do not depend on the parts; the update is the mean of theirs, statistics follow each."""
    ready, state, metrics = _stepped(4, 1)
    chex.assert_trees_all_close(ready, _stepped(1, 1)[0], rtol=1e-6)
    w, mean, grads, losses = np.arange(4.), np.zeros(4), [], []
    for i in range(4):
        x = ready["image"][i::4].reshape(4, 4).astype(np.float64)
        noise = ready["adversarial"][i::4].mean((1, 2, 3, 4))
        error = (x - x.mean(0)) @ w + noise
        grads.append(2 * (x - x.mean(0)).T @ error / 4)
        losses.append(np.mean(error**2))
        mean = 0.5 * mean + 0.5 * x.mean(0)
    np.testing.assert_allclose(state.params["a"]["w"], w - 0.1 * np.mean(grads, 0), rtol=1e-5)
    np.testing.assert_allclose(state.batch_stats["a"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose([metrics["loss"], metrics["seen"]], [np.mean(losses), 7.5], rtol=1e-5)
    assert not np.allclose(state.params["a"]["w"], _stepped(1, 1)[1].params["a"]["w"])


def test_parts_are_the_same_on_several_devices():
    chex.assert_trees_all_close(_stepped(4, 4), _stepped(4, 1), rtol=1e-6)


def test_a_batch_that_does_not_divide():
    config = configs.default()
    config.train.accumulate = 3
    with pytest.raises(UserError, match="train.accumulate is 3: expected a divisor of data.batch_size \\(128\\)"):
        configs.check(config)


def test_the_average_of_the_weights():
    """By hand; it starts as the weights, follows them soon, and keeps what masks removed at zero."""
    variables = {"params": {"a": {"w": jnp.array([1., 2.])}}, "batch_stats": {"a": {"mean": jnp.zeros(1)}}}
    state = ema.begin(states.fresh(variables, {"a": optax.sgd(0.1)}, {"a": {"w": jnp.array([1., 0.])}}))
    assert state.extra["ema"]["params"]["a"]["w"].tolist() == [1, 0]
    average, update = np.array([1., 0.]), ema.update(0.3)
    for count in range(1, 5):
        state = update(state.replace(step=jnp.int32(count), params={"a": {"w": jnp.array([float(count), 0.])}}))
        kept = min(0.3, (1 + count) / (10 + count))
        average = kept * average + (1 - kept) * np.array([count, 0.])
        np.testing.assert_allclose(state.extra["ema"]["params"]["a"]["w"], average, rtol=1e-6)
    assert state.extra["ema"]["params"]["a"]["w"][1] == 0 and state.params["a"]["w"][0] == 4


def test_indices_are_not_averaged():
    """They are taken as they are: between two channels stands a third, and float32 has no number for large ones."""
    def indices(*values):
        return {"a": {"inputs": jnp.array(values, jnp.int32)}}

    state = ema.begin(states.fresh({"params": {"a": {"w": jnp.ones(1)}}, "batch_stats": indices(3, 2**24 + 1)}, {}))
    found = ema.update(0.9)(state.replace(step=jnp.int32(5), batch_stats=indices(8, 2**24 + 1))).extra["ema"]
    assert found["batch_stats"]["a"]["inputs"].tolist() == [8, 2**24 + 1]
    assert found["batch_stats"]["a"]["inputs"].dtype == jnp.int32
