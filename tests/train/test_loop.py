"""The loop: stopped anywhere and continued it ends with the same bits; what it keeps, refuses and warns of.

One tiny AdvMoE on 120 digits serves all tests: 6 iterations, evaluated every 2, saved every 3.
"""

import dataclasses
import gc
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import listing

from advmoe_jax.attacks import verdicts
from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import NonFiniteError, Preempted, UserError
from advmoe_jax.data.split import Arrays
from advmoe_jax.ops import routing
from advmoe_jax.systems.assemble import assemble
from advmoe_jax.train import checkpoint, log, loop
from advmoe_jax.train import state as states
from advmoe_jax.train import step as train_step
from advmoe_jax.train.system import Stage, System

TOTAL = 6


@pytest.fixture(scope="module")
def experiment(tiny_resnet):
    config = configs.default()
    for text in ("data.name=digits", "data.subset=120", "data.batch_size=16", "data.pad=1", "model.depth=4",
                 "model.width=8", "model.router_width=4", "attack.num_steps=1", "system.loss=madry",
                 f"train.length={TOTAL} steps", "train.eval_every=2 steps", "train.save_every=3 steps",
                 "train.log_every=1 steps", "train.attack=fgsm", "eval.batch_size=16"):
        configs.override(config, text)
    return assemble(config)


def _train(experiment, workdir, system=None, config=None):
    workdir.mkdir(exist_ok=True)
    loop.run(config or experiment.config, workdir, system or experiment.system, experiment.train, experiment.select,
             experiment.mesh)


def _outcome(experiment, workdir):
    """All that a run leaves: the bits of its newest and best states, and its metrics but for the speed."""
    abstract = loop.abstract_state(experiment.system, experiment.mesh)
    saved = checkpoint.open_checkpoints(workdir)
    found = {}
    try:
        for which in ("last", "best"):
            state, step = saved.restore(which, abstract), saved.step(which)
            found[which] = {"saved": step} | {name: leaf.tobytes() for name, leaf in tree.named_leaves(
                jax.device_get(state)).items()}
    finally:
        saved.close()
    found["metrics"] = [{k: v for k, v in record.items() if k != "images_per_second"}
                        for record in log.Metrics(workdir / "metrics.jsonl").read()]
    return found


def _steps(workdir, which):
    return sorted(int(path.name) for path in (workdir / "checkpoints" / which).iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory):
    """The workdir of a run that nothing stopped, and what it left."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    _train(experiment, workdir)
    return workdir, _outcome(experiment, workdir)


def _assert_same(found, expected):
    assert found["metrics"] == expected["metrics"]
    for which in ("last", "best"):
        assert found[which].keys() == expected[which].keys()
        assert [name for name in found[which] if found[which][name] != expected[which][name]] == []


def _at_step(patch, step, stream, action):
    """Runs `action` when the batch of a step is asked for."""
    batch_indices = loop.pipeline.batch_indices

    def patched(indices, batch_size, seed, of, at):
        if (at, of) == (step, stream):
            action()
        return batch_indices(indices, batch_size, seed, of, at)

    patch.setattr(loop.pipeline, "batch_indices", patched)


class Killed(BaseException):
    """As a process that is gone: nothing in the package may catch it."""


def _kill():
    raise Killed


def test_what_a_run_leaves(whole):
    workdir, found = whole
    assert _steps(workdir, "last") == [3, 6] and found["last"]["saved"] == TOTAL
    assert len(_steps(workdir, "best")) == 1
    by_split = {split: [r["step"] for r in found["metrics"] if r["split"] == split]
                for split in ("train", "validation")}
    assert by_split == {"train": [1, 2, 3, 4, 5, 6], "validation": [2, 4, 6]}
    names = found["last"].keys()
    for part in ("params", "batch_stats", "opt"):
        for group in ("backbone", "router"):
            assert any(name.startswith(f"{part}/{group}") for name in names)
    record = next(r for r in found["metrics"] if r["split"] == "train")
    assert {"lower/loss", "upper/loss", "upper/load", "epoch"} <= record.keys()


def test_the_best_checkpoint_is_that_of_the_highest_ra_then_sa(whole):
    _, found = whole
    measured = [(r["ra"], r["sa"], r["step"]) for r in found["metrics"] if r["split"] == "validation"]
    best = max(measured, key=lambda m: m[:2])
    assert found["best"]["saved"] == best[2]


@pytest.mark.parametrize("step, stream", [(0, "data/lower"), (3, "data/lower"), (4, "data/upper")])
def test_killed_and_started_again_it_ends_with_the_same_bits(experiment, whole, tmp_path, step, stream):
    """Before any checkpoint, right after one, and after a best one that is newer than the last one."""
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, step, stream, _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path)
    assert _steps(tmp_path, "last") == ([3] if step >= 3 else [])
    _train(experiment, tmp_path)
    _assert_same(_outcome(experiment, tmp_path), whole[1])


def test_killed_before_the_last_save(experiment, whole, tmp_path):
    """The last evaluation is written, its checkpoint is not."""
    with pytest.MonkeyPatch.context() as patch:
        save = checkpoint.Checkpoints.save
        patch.setattr(checkpoint.Checkpoints, "save", lambda self, which, step, state, meta: (
            _kill() if (which, step) == ("last", TOTAL) else save(self, which, step, state, meta)))
        with pytest.raises(Killed):
            _train(experiment, tmp_path)
    assert log.Metrics(tmp_path / "metrics.jsonl").read()[-1]["step"] == TOTAL
    _train(experiment, tmp_path)
    _assert_same(_outcome(experiment, tmp_path), whole[1])


def test_killed_in_the_middle_of_a_metrics_line(experiment, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, 4, "data/lower", _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "split": "tr')
    _train(experiment, tmp_path)
    _assert_same(_outcome(experiment, tmp_path), whole[1])


def test_a_finished_run_returns_at_once(experiment, whole, monkeypatch):
    workdir, found = whole
    _at_step(monkeypatch, TOTAL, "data/lower", _kill)
    monkeypatch.setattr(loop.evaluate, "run", lambda *_, **__: _kill())
    _train(experiment, workdir)
    _assert_same(_outcome(experiment, workdir), found)


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def _truncate_largest(folder):
    largest = max(_files(folder), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def _empty_all(folder):
    for path in _files(folder):
        path.write_bytes(b"")


def _without_state(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize("damage", [_truncate_largest, _empty_all, _without_state])
def test_a_damaged_checkpoint_is_skipped(experiment, whole, tmp_path, capfd, damage):
    """With a warning; the run continues from what can be read, to the same bits."""
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    damage(workdir / "checkpoints" / "last" / "6")
    _train(experiment, workdir)
    gc.collect()
    told = capfd.readouterr()
    assert told.err.startswith("warning: checkpoint 6 cannot be read and is skipped") and told.err.count("\n") == 1
    assert "continuing from the checkpoint of step 3" in told.out
    _assert_same(_outcome(experiment, workdir), whole[1])


@pytest.mark.parametrize("damage", [_truncate_largest, _empty_all])
def test_without_a_readable_checkpoint_nothing_is_trained_or_deleted(experiment, whole, tmp_path, capfd, damage):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    for step in (3, 6):
        damage(workdir / "checkpoints" / "last" / str(step))
    before = listing(tmp_path)
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        _train(experiment, workdir)
    gc.collect()
    told = capfd.readouterr()
    assert told.err.count("cannot be read and is skipped") == told.err.count("\n") == 2 and told.out == ""
    assert listing(tmp_path) == before


@pytest.mark.parametrize("step, stream", [(2, "data/upper"), (4, "data/lower")])
def test_sigterm_saves_and_the_same_command_continues(experiment, whole, tmp_path, step, stream):
    """Where a checkpoint is due anyway, and where none is."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, step, stream, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted, match=f"saved at step {step + 1} of {TOTAL}") as caught:
            _train(experiment, tmp_path)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert _steps(tmp_path, "last")[-1] == step + 1
    _train(experiment, tmp_path)
    found = _outcome(experiment, tmp_path)
    _assert_same(found, whole[1])


def test_sigterm_in_the_last_iteration_ends_the_run_as_usual(experiment, whole, tmp_path, monkeypatch):
    _at_step(monkeypatch, TOTAL - 1, "data/upper", lambda: signal.raise_signal(signal.SIGTERM))
    _train(experiment, tmp_path)
    _assert_same(_outcome(experiment, tmp_path), whole[1])


def _poisoned(system, at, tensor):
    """The system, whose upper step reports `tensor` as not finite in iteration `at`."""
    [stage] = system.stages
    lower, upper = stage.steps

    def run(state, batch):
        bad = int(state.step) == at
        state, batch, metrics = upper.run(state, batch)
        return state, batch, metrics | {"non_finite": jnp.int32(upper.tensors.index(tensor))} if bad else metrics

    steps = lower, dataclasses.replace(upper, run=run)
    return dataclasses.replace(system, stages=(dataclasses.replace(stage, steps=steps),))


def test_a_step_runs_when_it_is_its_turn(experiment, tmp_path):
    """And whoever shares its stream in the same iteration gets the batch that it gives back."""
    [stage] = experiment.system.stages
    ran = []

    def spy(step, stream, every):
        def run(state, batch):
            ran.append((step.name, int(state.step), "seen" in batch))
            state, batch, metrics = step.run(state, {k: v for k, v in batch.items() if k != "seen"})
            return state, batch | {"seen": True}, metrics
        return dataclasses.replace(step, run=run, stream=stream, every=every)

    lower, upper = stage.steps
    steps = spy(lower, "data", 2), spy(upper, "data", 1)
    _train(experiment, tmp_path, dataclasses.replace(
        experiment.system, stages=(dataclasses.replace(stage, length=4, steps=steps),)))
    assert ran == [("lower", 0, False), ("upper", 0, True), ("upper", 1, False),
                   ("lower", 2, False), ("upper", 2, True), ("upper", 3, False)]
    train = [record for record in log.Metrics(tmp_path / "metrics.jsonl").read()
             if record["split"] == "train"]
    assert [any(name.startswith("lower/") for name in record) for record in train] == [True, False, True, False]


@pytest.mark.parametrize("at, good", [
    (2, "there is no checkpoint yet"), (5, "is of step 3")])
def test_non_finite_training_names_step_tensor_and_checkpoint(experiment, tmp_path, at, good):
    tensor = "gradient backbone/linear/bias"
    with pytest.raises(NonFiniteError) as caught:
        _train(experiment, tmp_path, _poisoned(experiment.system, at, tensor))
    message = str(caught.value)
    assert caught.value.exit_code == 4 and "\n" not in message
    assert f"step {at + 1}: {tensor} of the upper update is not finite" in message and good in message
    assert _steps(tmp_path, "last") == ([3] if at >= 3 else []), "what is not finite is never saved"


def test_collapse_is_warned_of_once(capsys):
    means = {"upper/loss": 1., "upper/load": np.full((3, 2), 0.5), "upper/load_entropy": np.array([0.9, 0.05, 0.0])}
    found = loop._warn_of_collapse(means, {})
    told = capsys.readouterr().err
    assert "warning: upper" in told and "2 of 3 layers (1, 2)" in told and "balance_loss" in told
    assert loop._warn_of_collapse(means, found) == found == {"upper": (1, 2)}
    assert not capsys.readouterr().err, "not again until it changes"
    assert loop._warn_of_collapse(means | {"upper/load_entropy": np.array([0.9, 0.3, 0.2])}, found) == {}
    assert not capsys.readouterr().err


def test_a_collapsed_router_is_warned_of_while_training(experiment, tmp_path, capsys):
    [stage] = experiment.system.stages
    lower, upper = stage.steps

    def run(state, batch):
        state, batch, metrics = lower.run(state, batch)
        # All images change sides in every iteration: the mean load is even.
        one, other = (1., 0.) if int(state.step) % 2 else (0., 1.)
        load = jnp.asarray([[one, other]] * len(metrics["load"]))
        return state, batch, metrics | {"load": load, "load_entropy": routing.load_entropy(load)}

    steps = dataclasses.replace(lower, run=run), upper
    _train(experiment, tmp_path, dataclasses.replace(
        experiment.system, stages=(dataclasses.replace(stage, steps=steps),)))
    assert capsys.readouterr().err.count("warning: lower: one expert gets nearly all images") == 1


def _plan(patch, rates):
    """Evaluations that find given [(the images of 20 that survive each attack, as (first, end), sa)], in order."""
    rates = iter(rates)
    index = np.arange(20)

    def found(*_, **__):
        survivors, sa = next(rates)
        attempts = [verdicts.Attempt(None, "none", index >= 0, {
            "label": ((index < first) | (index >= end)).astype(int)}, 0., {}) for first, end in survivors]
        return verdicts.Found(index, np.zeros(20, int), {"label": (index >= 20 * sa).astype(int)}, tuple(attempts))

    patch.setattr(loop.evaluate, "run", found)


@pytest.mark.parametrize("rates, best", [
    ([([(0, 6)], 0.5), ([(0, 6)], 0.6), ([(0, 4)], 0.9)], 4),
    ([([(0, 10)], 0.5), ([(2, 12)], 0.5), ([(0, 4)], 0.9)], 2),
    ([([(0, 0)], 0.0), ([(0, 20)], 0.0), ([(0, 0)], 0.0)], 2),
    ([([(0, 12), (6, 12)], 0.9), ([(0, 8), (0, 8)], 0.5), ([(0, 9), (9, 18)], 0.95)], 4)])
def test_best_is_by_ra_over_all_attacks_then_sa_then_the_first(experiment, tmp_path, monkeypatch, rates, best):
    """An image survives if it does every attack, and if it is classified correctly to begin with."""
    _plan(monkeypatch, rates)
    _train(experiment, tmp_path)
    assert _steps(tmp_path, "best") == [best]


def test_a_resumed_run_remembers_what_was_best(experiment, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        _plan(patch, [([(0, 10)], 0.5)])
        _at_step(patch, 3, "data/lower", _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        _plan(patch, [([(0, 8)], 0.9), ([(0, 6)], 0.9)])
        _train(experiment, tmp_path)
    assert _steps(tmp_path, "best") == [2]


def test_there_is_a_best_checkpoint_even_if_a_resumed_run_measures_less(experiment, tmp_path):
    """On other devices it may: the best checkpoint was newer than the last one, and is gone."""
    with pytest.MonkeyPatch.context() as patch:
        _plan(patch, [([(0, 10)], 0.5), ([(0, 12)], 0.6)])
        _at_step(patch, 4, "data/lower", _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path)
    assert (_steps(tmp_path, "best"), _steps(tmp_path, "last")) == ([4], [3])
    with pytest.MonkeyPatch.context() as patch:
        _plan(patch, [([(0, 8)], 0.6), ([(0, 9)], 0.6)])
        _train(experiment, tmp_path)
    assert _steps(tmp_path, "best") == [6]


# Stages, on a linear model.


@pytest.fixture(scope="module")
def staged():
    """Two stages of three iterations with steps of different names."""
    mesh = meshes.make()
    optimizer = optax.sgd(0.1)
    images = np.random.default_rng(0).integers(0, 256, (32, 2, 2, 1)).astype(np.uint8)
    train = Arrays(images, (images.mean((1, 2, 3)) > 127).astype(np.int32))

    def init(key):
        return states.fresh({"params": {"backbone": {"w": jnp.zeros((4, 2))}}}, {"backbone": optimizer})

    def logits(w, x):
        return x.reshape(x.shape[0], -1) @ w, {}

    def objective(params, batch_stats, batch):
        log_p = jax.nn.log_softmax(logits(params["backbone"]["w"], batch["image"])[0])
        return -jnp.mean(jnp.take_along_axis(log_p, batch["label"][:, None], 1)), (batch_stats, {})

    prepare = train_step.preparation(None, seed=0, mesh=mesh, data_cfg=types.SimpleNamespace(pad=0, flip=False))

    def step(name):
        return train_step.make(
            name, objective, prepare, owns=("backbone",), optimizers={"backbone": optimizer},
            state=jax.eval_shape(init, rng.key(0, "init")), mesh=mesh, stream=name, crops=name, ends_iteration=True)

    system = System(
        init=jax.jit(init, out_shardings=meshes.replicated(mesh)),
        stages=tuple(Stage(name, 3, np.arange(32), (step(f"{name}_only"),)) for name in ("first", "second")),
        outputs_fn=lambda state, view: jax.tree_util.Partial(logits, state.params["backbone"]["w"]), views=("none",),
        network=types.SimpleNamespace(num_experts=1), describe="toy")
    config = configs.default()
    for text in ("data.batch_size=8", "train.eval_every=0 steps", "train.save_every=0 steps", "train.log_every=0 steps",
                 "train.attack=fgsm", "eval.batch_size=32"):
        configs.override(config, text)
    return types.SimpleNamespace(config=config, system=system, train=train, select=(train, np.arange(32)), mesh=mesh)


@pytest.mark.parametrize("log_every", ["1 steps", "0 steps"])
def test_stages_follow_each_other(staged, tmp_path, log_every):
    """Wherever the log falls: the metrics of an iteration are looked at in the next one, in another stage."""
    config = staged.config.copy_and_resolve_references()
    configs.override(config, f"train.log_every={log_every}")
    _train(staged, tmp_path, config=config)
    found = _outcome(staged, tmp_path)
    assert found["last"]["saved"] == 6
    losses = {name: value for r in found["metrics"] for name, value in r.items() if name.endswith("/loss")}
    assert losses.keys() == {"first_only/loss", "second_only/loss"}


def test_a_run_stopped_in_its_second_stage_continues_there(staged, tmp_path):
    config = staged.config.copy_and_resolve_references()
    configs.override(config, "train.log_every=1 steps")
    configs.override(config, "train.save_every=2 steps")
    outcomes = []
    for name in ("whole", "killed"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "killed":
                _at_step(patch, 5, "second_only", _kill)
                with pytest.raises(Killed):
                    _train(staged, tmp_path / name, config=config)
        _train(staged, tmp_path / name, config=config)
        outcomes.append(_outcome(staged, tmp_path / name))
    _assert_same(outcomes[1], outcomes[0])
