"""Trainings against several norms at once: E-AT draws by robust error, RAMP pairs answers and projects gradients.

What every system promises is in test_steps.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_images

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.ops import losses
from advmoe_jax.systems import adversarial, eat, ramp, standard
from advmoe_jax.train import state as states

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH = (8, 8, 1), 4, 16, 16
DATA = random_images.data(COUNT)
TWO = "train.attack=rotation(limit=0) fog"


def _config(system, *texts):
    config = configs.default(system=system)
    configs.override_all(config, ["model.num_experts=1", "model.depth=4", "model.width=4", "train.length=2 steps",
                                  f"data.batch_size={BATCH}", "data.pad=0", "data.flip=false", *texts])
    return config


@functools.cache
def _net():
    net = network.make(_config("standard").model, SHAPE, CLASSES)
    return net, jax.device_get(jax.jit(net.init)(jax.random.key(0)))


def test_robust_errors_until_now():
    found = {"right": jnp.array([3.0, 1.0]), "steps": jnp.array([4.0, 4.0])}
    np.testing.assert_allclose(eat.errors(found), [0.25, 0.75])
    np.testing.assert_allclose(eat.errors(found | {"steps": jnp.array([4.0, 0.0])}), [0.5, 0.5])


def test_attacks_are_drawn_in_proportion_to_the_error():
    """Through the compiled steps: what was drawn is what was attacked, and it alone is counted."""
    config, mesh = _config("eat", TWO), meshes.make()
    system = eat.make(config, _net()[0], DATA, mesh, {})
    [step], state = system.steps, system.init(jax.random.key(0))
    batch, drawn = pipeline.device_batch(mesh, DATA.train, np.arange(BATCH)), []

    def at(state, number, right):
        extra = {eat.NAME: {"right": jnp.array(right), "steps": jnp.array([10.0, 10.0])}}
        put = jax.device_put((extra, np.int32(number)), meshes.replicated(mesh))
        return state.replace(extra=put[0], step=put[1])

    for number in range(40):
        ready = step.prepare(at(state, number, [9.0, 6.0]), batch, step.inputs)
        turn = int(np.asarray(ready["turn"])[0])
        is_clean = np.array_equal(ready["adversarial"][:, 0], ready["image"])
        assert is_clean == (turn == 0)
        drawn.append(turn)
    assert 0.65 < np.mean(drawn) < 0.95, "an error of 0.4 against one of 0.1"
    assert all(int(np.asarray(step.prepare(at(state, n, [10.0, 0.0]), batch, step.inputs)["turn"])[0]) == 1
               for n in range(5))
    ready = step.prepare(at(state, 0, [10.0, 0.0]), batch, step.inputs)
    after, metrics = step.update(at(state, 0, [10.0, 0.0]), ready)
    np.testing.assert_allclose(after.extra[eat.NAME]["steps"], [10, 11])
    np.testing.assert_allclose(after.extra[eat.NAME]["right"], [10, metrics["ra"]], rtol=1e-6)


def test_the_natural_gradient_counts_where_it_agrees():
    a = {"same": jnp.array([2.0, 0.0]), "apart": jnp.array([1.0, 0.0]), "half": jnp.array([1.0, 0.0])}
    n = {"same": jnp.array([4.0, 0.0]), "apart": jnp.array([-1.0, 0.0]), "half": jnp.array([1.0, 1.0])}
    found = ramp.projected(a, n, 0.5)
    np.testing.assert_allclose(found["same"], [3, 0])
    np.testing.assert_allclose(found["apart"], [0.5, 0])
    np.testing.assert_allclose(found["half"], [0.5 + 0.5 * np.sqrt(0.5), 0.5 * np.sqrt(0.5)], rtol=1e-6)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(ramp.projected(a, n, 0)), jax.tree.leaves(a)))


def test_answers_are_paired_where_the_first_is_right():
    first, second = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0, 1.0], [3.0, 0.0]])
    y, right = jnp.array([0, 0]), jnp.array([True, False])
    worse = np.maximum(losses.cross_entropy(first, y), losses.cross_entropy(second, y)).mean()
    pair = float(losses.kl(first, second)[0])
    assert float(ramp.paired(first, second, y, right, 5.0)) == pytest.approx(worse + 5 * pair, rel=1e-6)
    assert float(ramp.paired(first, second, y, ~(right | True), 5.0)) == pytest.approx(worse, rel=1e-6)


@pytest.mark.slow
def test_the_step_of_ramp_is_the_projected_gradient():
    """The value is the paired loss; its gradient is by hand that of both trainings."""
    net, variables = _net()
    x = jnp.asarray(DATA.train.images, jnp.float32) / 255
    batch = {"image": x, "adversarial": jnp.stack([x[:, ::-1], 1 - x], 1), "label": DATA.train.labels}

    @functools.partial(jax.jit, static_argnums=0)
    def slope(texts, params):
        run = ramp._objective(net, _config("ramp", *texts))
        return jax.value_and_grad(lambda p: run(states.fresh(variables | {"params": p}, {}), batch)[0])(params)

    params = variables["params"]
    value, found = slope(("system.natural=0.5", "system.pairing=2"), params)
    alone, along = slope(("system.natural=0", "system.pairing=2"), params)
    _, natural = jax.jit(jax.value_and_grad(lambda p: adversarial.objective(net, _config(
        "standard", "system.loss=natural"))(states.fresh(variables | {"params": p}, {}), batch)[0]))(params)
    logits, *_ = jax.jit(net.train_pass)(variables, batch["adversarial"])
    right = jnp.argmax(logits[:, 0], -1) == batch["label"]
    expected = float(ramp.paired(logits[:, 0], logits[:, 1], batch["label"], right, 2.0))
    assert float(value) == pytest.approx(expected, rel=1e-5) and float(alone) == pytest.approx(expected, rel=1e-5)
    wanted = tree.named_leaves(ramp.projected(along, natural, 0.5))
    for name, leaf in tree.named_leaves(found).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-4, atol=1e-6 * max(1, np.abs(wanted[name]).max()))


@pytest.mark.parametrize("mixed", ["system.mixup=0.3", pytest.param("system.cutmix=1", marks=pytest.mark.slow)])
def test_labels_may_be_soft(mixed):
    """Smoothed and mixed in the loss; the attack knows the image's own label."""
    config = _config("standard", "system.loss=madry", "train.attack=rotation(limit=0)", "system.label_smoothing=0.2",
                     mixed, "data.jitter=0.1", "data.turn=2")
    mesh, (net, _) = meshes.make(), _net()
    system = standard.make(config, net, DATA, mesh, {})
    [step], state = system.steps, system.init(jax.random.key(0))
    ready = step.prepare(state, pipeline.device_batch(mesh, DATA.train, np.arange(BATCH)), step.inputs)
    target = np.asarray(ready["target"])
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-5)
    assert target.min() == pytest.approx(0.05, rel=1e-3) and np.array_equal(ready["label"], DATA.train.labels)
    np.testing.assert_array_equal(ready["adversarial"][:, 0], ready["image"])
    logits, *_ = jax.jit(net.train_pass)(jax.device_get(state.variables), ready["adversarial"])
    expected = float(jnp.mean(losses.cross_entropy(logits[:, 0], target)))
    _, metrics = step.update(state, ready)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("system, texts, says", [
    ("eat", ["train.attack=pgd"], "expected two attacks or more"),
    ("eat", [TWO, "train.several=mean"], "and several turn"), ("eat", [TWO, "system.loss=natural"], "natural"),
    ("ramp", [TWO], "expected two, and several mean"), ("ramp", ["train.attack=fog snow rotation"], "names 3 attacks"),
    ("ramp", [TWO, "train.several=mean", "system.natural=2"], "system.natural is 2"),
    ("standard", ["system.mixup=-1"], "system.mixup is -1"), ("standard", ["data.jitter=2"], "data.jitter is 2"),
    ("standard", ["train.several=biggest"], "train.several 'biggest'")])
def test_bad_input_is_said_in_a_line(system, texts, says):
    with pytest.raises(UserError) as error:
        configs.check(_config(system, *texts))
    assert says in str(error.value) and "\n" not in str(error.value)
