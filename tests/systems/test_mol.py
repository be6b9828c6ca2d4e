"""The training of a gate before finished experts: what changes, what rests, and what is refused.

What every system promises is in test_steps.py. Networks of one block, one expert pruned and one dense.
"""

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
from advmoe_jax.models import model as models
from advmoe_jax.models import network
from advmoe_jax.ops import masks as masking
from advmoe_jax.systems import mol, sources
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH, STEPS = (8, 8, 1), 4, 32, 16, 3
DATA = random_images.data(COUNT)
EXPERT = ["model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=4"]
ATTACK = "fog pgd(num_steps=1,norm=l2,eps=0.3) rotation"


def _config(*overrides):
    config = configs.default(system="mol", model="mixture")
    configs.override_all(config, [
        *EXPERT, "model.num_members=2", f"data.batch_size={BATCH}", f"train.length={STEPS} steps", "init_from=a, b",
        f"train.attack={ATTACK}", "optim.backbone.schedule=constant", "data.pad=0", "data.flip=false", *overrides])
    return config


@functools.cache
def _sources():
    """Expert a is pruned, expert b dense."""
    config = configs.default(system="standard")
    configs.override_all(config, EXPERT)
    net = network.make(config.model, SHAPE, CLASSES)
    init, found = jax.jit(net.init), {}
    for i, name in enumerate("ab"):
        variables, masks = jax.device_get(init(jax.random.key(i))), {}
        if name == "a":
            kernel = variables["params"]["backbone"]["layer1_0"]["conv1"]["kernel"]
            masks = {"backbone": masking.of_leaves(variables["params"]["backbone"], {
                "layer1_0/conv1/kernel": np.arange(kernel.size).reshape(kernel.shape) % 4 == 0})}
            variables["params"]["backbone"] = jax.device_get(masking.apply(
                variables["params"]["backbone"], masks["backbone"]))
        found[name] = Source(None, config, net, variables, masks, 0)
    return found


def _system(*overrides, given=None):
    config = _config(*overrides)
    return mol.make(config, models.make(config.model, SHAPE, CLASSES), DATA, meshes.make(), given or _sources())


@functools.cache
def _run(*overrides):
    """The system, its states before the first step and after the last, and the metrics of the last."""
    system, mesh = _system(*overrides), meshes.make()
    state = system.init(rng.key(0, "init"))
    first = jax.device_get(state)
    for step in range(system.length):
        rows = np.arange(BATCH) + BATCH * (step % 2)
        state, metrics = loop.iterate(system, state, step, 2, lambda _, rows=rows: pipeline.device_batch(
            mesh, DATA.train, rows))
    return system, first, jax.device_get(state), jax.device_get(metrics)


def _changed(first, last, part="params"):
    ours, theirs = (tree.named_leaves(getattr(state, part)) for state in (first, last))
    assert ours.keys() == theirs.keys()
    return {name for name in ours if ours[name].tobytes() != theirs[name].tobytes()}


def test_it_starts_from_its_experts():
    """Each as it was, masks and statistics too; the gate afresh, by the seed."""
    system, first, *_ = _run()
    for group, source in zip(system.model.members, _sources().values()):
        for part in ("params", "batch_stats"):
            ours, theirs = getattr(first, part)[group], source.variables[part]
            assert {k: v.tobytes() for k, v in tree.named_leaves(ours).items()} == {
                k: v.tobytes() for k, v in tree.named_leaves(theirs).items()}
    assert list(first.masks) == ["expert0"]
    again = jax.device_get(_system("seed=1").init(rng.key(1, "init")))
    assert _changed(first, again) and all(name.startswith("gate/") for name in _changed(first, again))


def test_the_gate_and_the_last_layers_are_trained_and_nothing_else():
    """Bit by bit, statistics and masked weights included; weight decay and momentum do not reach what rests."""
    system, first, last, metrics = _run()
    own = {name for name in tree.named_leaves(first.params) if name.startswith("gate/") or "/linear/" in name}
    assert _changed(first, last) == own and len([name for name in own if "expert" in name]) == 4
    stats = _changed(first, last, "batch_stats")
    assert stats and all(name.startswith("gate/") for name in stats)
    kernel = last.params["expert0"]["backbone"]["layer1_0"]["conv1"]["kernel"]
    assert np.count_nonzero(kernel) == kernel.size // 4
    assert metrics["train/non_finite"] == -1 and metrics["train/gate"].sum() == pytest.approx(1, rel=1e-5)
    assert system.describe == "mixture of 2 Dense, their last layers trained by madry"


def test_more_or_less_may_be_trained():
    [alone] = _system("system.finetune=none").steps
    assert alone.owns == ("gate",)
    _, first, last, _ = _run("system.finetune=all", "model.expert_norm=training", "train.length=1 steps")
    assert _changed(first, last) == set(tree.named_leaves(first.params))
    kernel = last.params["expert0"]["backbone"]["layer1_0"]["conv1"]["kernel"]
    assert np.count_nonzero(kernel) == kernel.size // 4, "what is pruned stays so"
    assert len(_changed(first, last, "batch_stats")) == len(tree.named_leaves(first.batch_stats))


def test_a_simple_average_trains_the_last_layers():
    system, first, last, _ = _run("model.gate=uniform", "model.combine=log_probabilities", "train.length=1 steps")
    assert set(last.params) == {"expert0", "expert1"} and system.model.gate is None
    assert all("/linear/" in name for name in _changed(first, last)) and len(_changed(first, last)) == 4


def test_a_finished_mixture_is_trained_on():
    config, (system, _, last, _) = _config(), _run()
    whole = {"whole": Source(None, config, system.model, {"params": last.params, "batch_stats": last.batch_stats},
                             last.masks, 0)}
    variables, masks = sources.initial(system.model, whole)
    assert variables["params"] == last.params and list(masks) == ["expert0"]


@pytest.mark.parametrize("overrides, says", [
    (["init_from="], "system.name=mol needs init_from"),
    (["model.num_members=3"], "init_from names 2 runs: expected 3"),
    (["model.width=8"], "of another architecture: batch_stats/expert0"), (["model.num_members=1"], "num_members is 1"),
    (["data.name=cifar100"], "which was trained on cifar10: expected experts of cifar100"),
    (["model.gate=uniform", "system.finetune=none"], "expected something to train"),
    (["system.finetune=fcc"], "did you mean 'fc'")])
def test_bad_input_is_said_in_a_line(overrides, says):
    with pytest.raises(UserError) as error:
        configs.check(_config(*overrides))
        _system(*overrides)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_network_has_no_gate():
    config = configs.default(system="mol", model="resnet")
    configs.override_all(config, ["model.num_experts=1", "init_from=a"])
    with pytest.raises(UserError, match="model.name is resnet: expected mixture"):
        configs.check(config)
