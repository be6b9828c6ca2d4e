"""The loop: stopped anywhere and continued it ends with the same bits; what it keeps, refuses and warns of.

One tiny AdvMoE on 120 digits serves all tests: 6 iterations, evaluated every 2, saved every 3.
"""

import dataclasses
import functools
import gc
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import listing

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import stop, tree
from advmoe_jax.core.errors import NonFiniteError, NoSpace, Preempted, UserError
from advmoe_jax.data.split import Arrays
from advmoe_jax.evaluation import measure, verdicts
from advmoe_jax.ops import routing
from advmoe_jax.systems.assemble import assemble
from advmoe_jax.train import checkpoint, log, loop
from advmoe_jax.train.system import Inputs

TOTAL = 6


@pytest.fixture(scope="module")
def experiment(tiny_resnet):
    config = configs.default()
    for text in ("data.name=digits", "data.subset=120", "data.batch_size=16", "data.pad=1", "model.depth=4",
                 "model.width=8", "model.router_width=4", "system.loss=madry", "train.ema=0.9",
                 "train.attack=pgd(num_steps=1,step_size=0.625 eps,start=gaussian,keep=last)",
                 f"train.length={TOTAL} steps", "train.eval_every=2 steps", "train.save_every=3 steps",
                 "train.log_every=1 steps", "train.select_attack=fgsm", "eval.batch_size=16"):
        configs.override(config, text)
    return assemble(config)


def _train(experiment, workdir, system=None, select=None, config=None):
    workdir.mkdir(exist_ok=True)
    return loop.run(config or experiment.config, workdir, system or experiment.system, experiment.data.train,
                    select or experiment.select, experiment.mesh)


def _outcome(experiment, workdir):
    """All that a run leaves: the bits of its newest and best states, and its metrics but for the speed."""
    abstract = loop.abstract_state(experiment.system, experiment.mesh)
    saved = checkpoint.open_checkpoints(workdir)
    found = {}
    try:
        for which in ("last", "best"):
            step = saved.step(which)
            state = checkpoint._read(getattr(saved, which), step, abstract)
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


def test_the_metrics_of_a_window_are_means_over_all_its_iterations(experiment, whole, tmp_path):
    """An iteration's metrics are fetched in the next one: the last of a window is not lost, nor in the window after."""
    config = experiment.config.copy_and_resolve_references()
    configs.override_all(config, ["train.log_every=0 steps", "train.eval_every=0 steps", "train.save_every=4 steps"])
    _train(experiment, tmp_path, config=config)
    found, single = ({r["step"]: r for r in log.Metrics(workdir / "metrics.jsonl").read() if r["split"] == "train"}
                     for workdir in (tmp_path, whole[0]))
    assert list(found) == [4, 6] and list(single) == [1, 2, 3, 4, 5, 6]
    for end, steps in ((4, (1, 2, 3, 4)), (6, (5, 6))):
        assert found[end].keys() == single[end].keys()
        for name in found[end].keys() - {"step", "split", "epoch", "images_per_second"}:
            np.testing.assert_allclose(found[end][name], np.mean([single[i][name] for i in steps], 0), atol=2e-6)
        assert found[end]["epoch"] == single[end]["epoch"]
    assert len({record["upper/loss"] for record in single.values()}) == TOTAL, "or means could be of anything"


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


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A split whose images are, as encoded ones, drawn ahead."""

    whole: Arrays

    decodes = True

    def __len__(self):
        return len(self.whole)

    @property
    def labels(self):
        return self.whole.labels

    def draw(self, row, generator):
        return np.roll(self.whole.take(row)["image"], generator.integers(3), 1)


def test_killed_while_images_are_drawn_ahead(experiment, tmp_path):
    """By a system one of whose steps rests in every second iteration."""
    pytest.importorskip("grain")
    first, *others = experiment.system.steps
    system = dataclasses.replace(experiment.system, steps=(dataclasses.replace(first, every=2), *others))
    config = experiment.config.copy_and_resolve_references()
    with config.unlocked():
        config.data.workers = 0
    drawn = dataclasses.replace(experiment, config=config, system=system, data=dataclasses.replace(
        experiment.data, train=Drawn(experiment.data.train)))
    asked, on_devices = [], loop.pipeline.on_devices

    def counted(mesh, local):
        if len(local["index"]) == config.data.batch_size:  # or it is of an evaluation
            asked.append(local["index"].tolist())
        return _kill() if len(asked) == 7 else on_devices(mesh, local)  # in iteration 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.pipeline, "on_devices", counted)
        with pytest.raises(Killed):
            _train(drawn, tmp_path / "killed")
        _train(drawn, tmp_path / "killed")
    _train(drawn, tmp_path / "whole")
    assert asked[5:7] == asked[7:9], "it goes on from iteration 3"
    assert len(asked) == 7 + 4
    _assert_same(*(_outcome(drawn, tmp_path / which) for which in ("killed", "whole")))


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
    _train(experiment, workdir, select=lambda state: _kill())
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


def test_sigterm_while_the_best_is_chosen_waits_and_ctrl_c_does_not(experiment, whole, tmp_path, monkeypatch):
    """What is saved of an evaluated step is evaluated. Ctrl-C is not raised from where the signal came, which may
    swallow it."""
    for number, raised, steps in ((signal.SIGINT, KeyboardInterrupt, []), (signal.SIGTERM, Preempted, [2])):
        def asked(state, number=number):
            signal.raise_signal(number)
            return experiment.select(state)

        with pytest.raises(raised), stop.noted():
            _train(experiment, tmp_path, select=asked)
        assert _steps(tmp_path, "last") == steps
    _train(experiment, tmp_path)
    _assert_same(_outcome(experiment, tmp_path), whole[1])


def test_without_a_last_checkpoint_it_goes_on_from_the_best(experiment, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "last")
    _train(experiment, workdir)
    found = _outcome(experiment, workdir)
    for which in ("last", "best"):
        assert found[which] == whole[1][which]


def test_a_full_disk_loses_nothing(experiment, whole, tmp_path, monkeypatch):
    """Storages say it in their own errors; the checkpoint, its size and the disk are named."""
    def full(self, step, **_):
        raise ValueError("RESOURCE_EXHAUSTED: ... [OS error 28: No space left on device]")

    with monkeypatch.context() as patch, pytest.raises(NoSpace, match=r"checkpoints/last/3: [\d,]{5,} bytes") as error:
        save = ocp.CheckpointManager.save
        patch.setattr(ocp.CheckpointManager, "save", lambda self, step, **more: (
            full if step == 3 else save)(self, step, **more))
        _train(experiment, tmp_path)
    assert error.value.exit_code == 74 and "\n" not in str(error.value)
    _train(experiment, tmp_path)
    _assert_same(_outcome(experiment, tmp_path), whole[1])


def test_a_damaged_log_is_set_aside(experiment, whole, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join([*lines[:3], "\0\n", *lines[4:]]))
    _train(experiment, workdir)
    assert "metrics.jsonl.damaged; 3 records of it are kept" in capfd.readouterr().err
    assert (workdir / "metrics.jsonl").read_text().splitlines(keepends=True) == lines[:3]
    assert (workdir / "metrics.jsonl.damaged").read_text().count("\n") == len(lines)


@pytest.mark.parametrize("step, stream", [(2, "data/upper"), (4, "data/lower")])
def test_sigterm_saves_and_the_same_command_continues(experiment, whole, tmp_path, step, stream):
    """Where a checkpoint is due anyway, and where none is."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, step, stream, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted, match=f"saved at step {step + 1} of {TOTAL}") as caught, stop.noted():
            _train(experiment, tmp_path)
    assert caught.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert _steps(tmp_path, "last")[-1] == step + 1
    _train(experiment, tmp_path)
    found = _outcome(experiment, tmp_path)
    _assert_same(found, whole[1])


def test_sigterm_in_the_last_iteration_ends_the_run_as_usual(experiment, whole, tmp_path, monkeypatch):
    """Which is told behind it."""
    _at_step(monkeypatch, TOTAL - 1, "data/upper", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted, match="the same command continues"), stop.noted():
        _train(experiment, tmp_path)
    _assert_same(_outcome(experiment, tmp_path), whole[1])


def _with_updates(system, change):
    """The system, whose steps run `change(step, state, batch)`."""
    def spied(step):
        return dataclasses.replace(step, update=lambda state, batch: change(step, state, batch))

    return dataclasses.replace(system, steps=tuple(map(spied, system.steps)))


def _poisoned(system, at, tensor):
    """The system, whose upper step reports `tensor` as not finite in iteration `at`."""
    def update(step, state, batch):
        bad = step.name == "upper" and int(state.step) == at
        state, metrics = step.update(state, batch)
        return state, metrics | {"non_finite": jnp.int32(step.tensors.index(tensor))} if bad else metrics

    return _with_updates(system, update)


def test_a_step_runs_when_it_is_its_turn(experiment, tmp_path):
    """And steps with the same inputs get the same arrays, made once in an iteration."""
    ran, made = [], []

    def prepare(state, batch, inputs):
        made.append((int(state.step), inputs))
        return experiment.system.steps[0].prepare(state, batch, inputs)

    def update(step, state, batch):
        ran.append((step.name, int(state.step), id(batch)))
        return step.update(state, batch)

    inputs = Inputs("data", "data", "data")
    lower, upper = (dataclasses.replace(step, inputs=inputs, prepare=prepare, every=every)
                    for step, every in zip(experiment.system.steps, (2, 1)))
    system = dataclasses.replace(experiment.system, length=4, steps=(lower, upper))
    _train(experiment, tmp_path, _with_updates(system, update))
    assert [(name, step) for name, step, _ in ran] == [
        ("lower", 0), ("upper", 0), ("upper", 1), ("lower", 2), ("upper", 2), ("upper", 3)]
    assert ran[0][2] == ran[1][2] and ran[3][2] == ran[4][2]
    assert made == [(step, inputs) for step in range(4)]
    train = [record for record in log.Metrics(tmp_path / "metrics.jsonl").read()
             if record["split"] == "train"]
    assert [any(name.startswith("lower/") for name in record) for record in train] == [True, False, True, False]


def test_the_final_state_is_returned(experiment, whole, tmp_path):
    """That of the last checkpoint; of a finished run too."""
    workdir, found = whole
    state = _train(experiment, workdir)
    ours = {name: leaf.tobytes() for name, leaf in tree.named_leaves(jax.device_get(state)).items()}
    assert {"saved": TOTAL} | ours == found["last"]


def test_changes_every_so_many_iterations(experiment, tmp_path):
    """After the iteration, and at the same ones in a run that was killed: the state alone says which."""
    def halved(state):
        state = jax.device_get(state)
        params = state.params | {"router": jax.tree.map(lambda leaf: leaf / 2, state.params["router"])}
        called.append(int(state.step))
        return jax.device_put(state.replace(params=params), meshes.replicated(experiment.mesh))

    called, system = [], dataclasses.replace(experiment.system, every={"2 steps": halved})
    _train(experiment, tmp_path / "whole", system)
    assert called == [2, 4, 6]
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, 4, "data/lower", _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path / "killed", system)
    called.clear()
    _train(experiment, tmp_path / "killed", system)
    assert called == [4, 6], "from the checkpoint of step 3 on"
    _assert_same(_outcome(experiment, tmp_path / "killed"), _outcome(experiment, tmp_path / "whole"))


def test_changes_come_before_the_state_is_measured_and_saved(experiment, tmp_path):
    """In order, each after as many iterations as its length says: 108 images are one epoch of 6. What a change keeps in
    `extra` is saved."""
    called, measured = [], []

    def counting(name):
        def change(state):
            called.append((name, int(state.step)))
            return state.replace(extra={"calls": state.extra["calls"] + 1})
        return change

    def init(key):
        calls = jax.device_put(jnp.zeros((), jnp.int32), meshes.replicated(experiment.mesh))
        return experiment.system.init(key).replace(extra={"calls": calls})

    def select(state):
        measured.append((int(state.step), int(state.extra["calls"])))
        return 0.5, 0.5

    system = dataclasses.replace(experiment.system, init=init, every={
        "50%": counting("half"), "1 epochs": counting("epoch"), "2 steps": counting("two")})
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, 5, "data/lower", _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path, system, select)
    assert called == [("two", 2), ("half", 3), ("two", 4)] and measured == [(2, 1), (4, 3)]
    state = _train(experiment, tmp_path, system, select)
    assert called[3:] == [("two", 4), ("half", 6), ("epoch", 6), ("two", 6)]
    assert measured[2:] == [(4, 3), (6, 6)] and int(state.extra["calls"]) == 6
    with checkpoint.opened(tmp_path) as saved:
        stored = saved.restore_newest(loop.abstract_state(system, experiment.mesh), pytest.fail)
    assert int(stored.extra["calls"]) == 6


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


def test_what_a_model_watches_is_told_once(experiment, capsys):
    model = experiment.system.model
    means = {"upper/loss": 1., "upper/load": np.full((3, 2), 0.5), "upper/load_entropy": np.array([0.9, 0.05, 0.0])}
    watch = functools.partial(loop._watch, model, batch_size=32, iterations=1)
    told = watch(means, told={})
    error = capsys.readouterr().err
    assert "warning: upper" in error and "2 of 3 layers (1, 2)" in error and "balance_loss" in error
    assert watch(means, told=told) == told and not capsys.readouterr().err, "not again until it changes"
    assert watch({"lower/loss": 1., "lower/load_entropy": np.ones(3)}, told=told)["upper"] == told["upper"]
    assert watch(means | {"upper/load_entropy": np.array([0.9, 0.3, 0.2])}, told=told) == {"upper": ()}
    assert not capsys.readouterr().err


@pytest.mark.parametrize("batch_size, iterations, load, warned", [
    (1, 100, 1., False), (2, 4, 1., False), (2, 40, 0.5, False), (2, 40, 1., True), (32, 1, 0.5, True)])
def test_few_images_say_nothing_of_the_load(experiment, batch_size, iterations, load, warned):
    """Their entropy is small however even the load is."""
    means = {"load": np.array([[load, 1 - load]]), "load_entropy": np.zeros(1)}
    assert bool(experiment.system.model.watch(means, batch_size, iterations)) == warned


def test_a_collapsed_router_is_warned_of_while_training(experiment, tmp_path, capsys):
    def update(step, state, batch):
        # All images change sides in every iteration: the mean load is even.
        one, other = (1., 0.) if int(state.step) % 2 else (0., 1.)
        state, metrics = step.update(state, batch)
        if step.name == "upper":
            return state, metrics
        load = jnp.asarray([[one, other]] * len(metrics["load"]))
        return state, metrics | {"load": load, "load_entropy": routing.load_entropy(load)}

    _train(experiment, tmp_path, _with_updates(experiment.system, update))
    assert capsys.readouterr().err.count("warning: lower: one expert gets nearly all images") == 1


def _rates(found):
    """What a selection measures in turn, given as (RA, SA)."""
    found = iter(found)
    return lambda state: next(found)


@pytest.mark.parametrize("rates, best", [
    ([(0.3, 0.5), (0.3, 0.6), (0.2, 0.9)], 4), ([(0.5, 0.5), (0.5, 0.5), (0.2, 0.9)], 2),
    ([(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], 2), ([(0.3, 0.9), (0.4, 0.5), (0.0, 0.95)], 4)])
def test_best_is_by_ra_then_sa_then_the_first(experiment, tmp_path, rates, best):
    _train(experiment, tmp_path, select=_rates(rates))
    assert _steps(tmp_path, "best") == [best]


def test_selection_counts_images_that_survive_every_attack(experiment, monkeypatch):
    """And that are classified correctly to begin with."""
    index = np.arange(20)
    attempts = [verdicts.Attempt(None, "none", index >= 0, {
        "label": ((index < first) | (index >= end)).astype(int)}, 0., {}) for first, end in ((0, 12), (6, 12))]
    found = verdicts.Found(index, np.zeros(20, int), {"label": (index >= 10).astype(int)}, tuple(attempts))
    monkeypatch.setattr(measure, "run", lambda *_, **__: found)
    assert experiment.select(types.SimpleNamespace(variables=None, masks={})) == (4 / 20, 0.5)


def test_a_resumed_run_remembers_what_was_best(experiment, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, 3, "data/lower", _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path, select=_rates([(0.5, 0.5)]))
    _train(experiment, tmp_path, select=_rates([(0.4, 0.9), (0.3, 0.9)]))
    assert _steps(tmp_path, "best") == [2]


def test_there_is_a_best_checkpoint_even_if_a_resumed_run_measures_less(experiment, tmp_path):
    """On other devices it may: the best checkpoint was newer than the last one, and is gone."""
    with pytest.MonkeyPatch.context() as patch:
        _at_step(patch, 4, "data/lower", _kill)
        with pytest.raises(Killed):
            _train(experiment, tmp_path, select=_rates([(0.5, 0.5), (0.6, 0.6)]))
    assert (_steps(tmp_path, "best"), _steps(tmp_path, "last")) == ([4], [3])
    _train(experiment, tmp_path, select=_rates([(0.4, 0.6), (0.45, 0.6)]))
    assert _steps(tmp_path, "best") == [6]
