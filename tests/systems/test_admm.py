"""Weights that are drawn to a pruned copy of themselves, and the run that prunes them."""

import functools

import jax
import numpy as np
import pytest
import random_images

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.pruning import admm as arithmetic
from advmoe_jax.systems import admm, prune
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import checkpoint, loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH, STEPS = (8, 8, 1), 4, 32, 16, 6
DATA = random_images.data(COUNT)
RATE, GROWTH = "3/4", 2.0


def _config(*overrides, system="admm"):
    config = configs.default(system=system)
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=8", f"data.batch_size={BATCH}",
        f"train.length={STEPS} steps", "init_from=base", "system.loss=natural", f"system.rate={RATE}",
        "optim.backbone.schedule=constant", "optim.backbone.learning_rate=0.05", "data.pad=0", "data.flip=false",
        *overrides])
    return config


@functools.cache
def _base():
    net = network.make(_config().model, SHAPE, CLASSES)
    return net, jax.device_get(jax.jit(net.init)(jax.random.key(3)))


@functools.cache
def _system(*overrides):
    config = _config("system.rho=0.5", f"system.growth={GROWTH}", *overrides)
    net, variables = _base()
    return admm.make(config, net, DATA, meshes.make(), {"base": Source(None, config, net, variables, {}, 0)})


def _train(system, state, first):
    """[(state, metrics)] after each iteration from `first` on."""
    mesh, found = meshes.make(), []
    for step in range(first, system.length):
        rows = np.arange(BATCH) + BATCH * (step % 2)
        state, metrics = loop.iterate(system, state, step, 2, lambda _, rows=rows: pipeline.device_batch(
            mesh, DATA.train, rows))
        found.append(jax.device_get((state, metrics)))
    return found


@functools.cache
def _run():
    """The state before the first step, then those after each with its metrics."""
    state = _system().init(rng.key(0, "init"))
    first = jax.device_get(state)
    return first, _train(_system(), state, 0)


def _kernels(state):
    return {path: leaf for path, leaf in tree.named_leaves(state.params).items() if path.endswith("kernel")}


def _same(ours, theirs):
    ours, theirs = tree.named_leaves(ours), tree.named_leaves(theirs)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_copy_is_updated_after_each_epoch_alone():
    """Z and U by hand; between the updates they rest, and the weights stay dense."""
    first, found = _run()
    assert not found[-1][0].masks and len(_kernels(first)) == 4
    assert first.extra["admm"].z.keys() == _kernels(first).keys()
    assert _same(first.params, _base()[1]["params"])
    before = first
    for step, (state, _) in enumerate(found):
        ours, old = state.extra["admm"], before.extra["admm"]
        if step % 2 == 0:
            assert _same(ours.z, old.z) and _same(ours.u, old.u) and ours.rho == old.rho
        else:
            assert ours.rho == old.rho * GROWTH
            for path, kernel in _kernels(state).items():
                moved = kernel + old.u[path]
                least = np.sort(np.abs(moved).ravel())[int(0.75 * moved.size)]
                expected = np.where(np.abs(moved) >= least, moved, 0)
                np.testing.assert_array_equal(ours.z[path], expected)
                np.testing.assert_allclose(ours.u[path], moved - expected, atol=1e-7)
        assert all(np.all(kernel) for kernel in _kernels(state).values())
        before = state


def test_the_distance_is_measured_and_falls():
    """While the copy rests."""
    first, found = _run()
    distances = [float(metrics["train/distance"]) for _, metrics in found]
    kernels, copies = _kernels(first), first.extra["admm"].z
    expected = np.sqrt(sum(np.sum((kernels[path] - copies[path])**2) for path in kernels)
                       / sum(np.sum(kernel**2) for kernel in kernels.values()))
    assert distances[0] == pytest.approx(expected, rel=1e-5) and distances[1] < 0.99 * distances[0]


def test_the_penalty_is_in_the_loss():
    """The first loss is that without ADMM and the penalty."""
    first, found = _run()
    penalty = float(arithmetic.penalty(_kernels(first), first.extra["admm"]))
    net, mesh = _base()[0], meshes.make()
    [step] = _system().steps
    state = jax.device_put(first, meshes.replicated(mesh))
    batch = step.prepare(state, pipeline.device_batch(mesh, DATA.train, np.arange(BATCH)), step.inputs)
    alone = jax.jit(admm.adversarial.objective(net, _config()))(state, batch)[0]
    assert float(found[0][1]["train/loss"]) == pytest.approx(float(alone) + penalty, rel=1e-5) and penalty > 0.1


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path):
    _, found = _run()
    middle, system = 3, _system()
    with checkpoint.opened(tmp_path) as saved:
        saved.save("last", middle, found[middle - 1][0], {})
        restored = saved.restore_newest(loop.abstract_state(system, meshes.make()), print)
    again = _train(system, restored, middle)
    assert _same(again[-1][0], found[-1][0])


def test_a_pruning_run_masks_what_the_copy_lacks():
    last = _run()[1][-1][0]
    config = _config("system.method=magnitude", "system.kernels=every", system="prune")
    source = Source(None, config, _base()[0], jax.tree.map(np.asarray, last.variables), {}, 0)
    state = prune.make(config, _base()[0], DATA, meshes.make(), {"base": source}).init(rng.key(1, "init"))
    for path, kernel in _kernels(jax.device_get(state)).items():
        assert np.count_nonzero(kernel) == kernel.size - int(0.75 * kernel.size)
        np.testing.assert_array_equal(kernel[kernel != 0], _kernels(last)[path][kernel != 0])


def test_units_and_an_average_beside_them():
    """Filters of the convolutions alone; an average of the weights is updated at the same time as the copy."""
    system = _system("system.unit=filter", "system.admm_every=1 steps", "train.ema=0.9")
    assert list(system.every) == ["1 steps"]
    state = system.init(rng.key(0, "init"))
    state = system.every["1 steps"](state.replace(params=jax.tree.map(lambda leaf: 2 * leaf, state.params)))
    found, weights = jax.device_get(state), tree.named_leaves(_base()[1]["params"])
    own = found.extra["admm"]
    assert {path.split("/")[-2] for path in own.z} == {"conv1", "conv2"} and own.rho == 1
    for path, z in own.z.items():
        kept = z.any((0, 1, 2))
        assert kept.sum() == z.shape[-1] // 4
        np.testing.assert_array_equal(z[..., kept], 2 * weights[path][..., kept])
    average = found.extra["ema"]["params"]["backbone"]["conv1"]["kernel"]
    np.testing.assert_allclose(average, 1.9 * weights["backbone/conv1/kernel"], rtol=1e-5)


@pytest.mark.parametrize("overrides, said", [
    (["init_from="], "system.name=admm needs init_from"), (["system.rate=0"], "system.rate is '0': expected more than"),
    (["system.unit=colum"], "did you mean 'column'"), (["system.rho=0"], "system.rho is 0"),
    (["system.growth=0.5"], "system.growth is 0.5"), (["system.admm_every=0 steps"], "expected more than nothing"),
    (["system.admm_every=often"], "system.admm_every is 'often'"), (["system.skip=."], "no convolution or linear"),
    (["system.unit=block(3,1)"], "divides into units"), (["model.width=16"], "of another architecture")])
def test_bad_input_is_said_in_a_line(overrides, said):
    with pytest.raises(UserError) as error:
        config = _config(*overrides)
        configs.check(config)
        source = Source(None, config, *_base(), {}, 0)
        admm.make(config, network.make(config.model, SHAPE, CLASSES), DATA, meshes.make(), {"base": source})
    assert said in str(error.value) and "\n" not in str(error.value)
