"""Two processes on this machine train, are stopped, go on and evaluate as one."""

import contextlib
import re
import signal
import socket

import pytest
from tiny import TIMEOUT, assert_same_bits, entries, flags, logged, metrics, process, saved_steps, wait_until

from advmoe_jax import main, modes
from advmoe_jax.core.paths import path

pytestmark = pytest.mark.multiprocess
STEPS = 16
FIELDS = dict(model__depth=10, train__length=f"{STEPS} steps", train__eval_every="8 steps", train__save_every="8 steps",
              eval__attacks="fgsm", optim__backbone__learning_rate=0.01)  # so that differences of rounding stay small


def command(workdir, method):
    """Of those that are attacked, madry compiles soonest."""
    return flags(workdir, method, **FIELDS, **({} if method == "natural" else {"system__loss": "madry"}))


@contextlib.contextmanager
def cluster(workdir, method, name, second_seed=0):
    """Two processes of two devices each; both are killed in the end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = [*command(workdir, method), "--coordinator", f"localhost:{port}", "--num_processes", "2"]
    second = [*joined, "--process_id", "1", f"--config.seed={second_seed}"]
    with (process([*joined, "--process_id", "0"], folder=workdir.parent, devices=2, name=f"{name}0") as first,
          process(second, folder=workdir.parent, devices=2, name=f"{name}1") as second):
        yield first, second


def output(workdir, name, suffix):
    """What each process wrote, without what the transport says of its connections."""
    transport = re.compile(r"^.*(\[Gloo\]|peer ranks).*\n", re.MULTILINE)  # the lines of two threads may mix
    return [transport.sub("", (workdir.parent / f"{name}{i}.{suffix}").read_text()) for i in (0, 1)]


def one_process(folder, method):
    """The workdir of a run of one process with as many devices."""
    with process(command(folder / "alone", method), folder=folder, devices=4, name="alone") as running:
        assert running.wait(TIMEOUT) == 0, (folder / "alone.err").read_text()
    return folder / "alone"


def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """Without attacks in training, which the longer tests have."""
    alone, workdir = one_process(tmp_path, "natural"), tmp_path / "w"
    with cluster(workdir, "natural", "two") as (first, second):
        codes = first.wait(TIMEOUT), second.wait(TIMEOUT)
    assert codes == (0, 0), output(workdir, "two", "err")
    compare(workdir, alone, ("train",))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at_sdense", "advmoe"])
def test_two_processes_train_save_stop_restore_and_evaluate(method, tmp_path):
    alone, workdir = one_process(tmp_path, method), tmp_path / "w"
    with cluster(workdir, method, "stopped") as (first, second):
        wait_until(logged(workdir, 3), second, "step 3")
        second.send_signal(signal.SIGTERM)
        codes = first.wait(TIMEOUT), second.wait(TIMEOUT)
    errors = output(workdir, "stopped", "err")
    assert codes == (75, 75), errors
    stopped = [re.search(r"error: stopped by SIGTERM; saved at step (\d+) of", error) for error in errors]
    assert all(stopped) and len({match[1] for match in stopped}) == 1
    for i in (0, 1):
        assert re.match(rf"process {i} of 2: meets the others at localhost:\d+, waits up to 300 s", errors[i])
    step = int(stopped[0][1])
    assert 3 <= step < STEPS and saved_steps(workdir)[-1] == step
    assert not any("Traceback" in error for error in errors)

    with cluster(workdir, method, "finished") as (first, second):
        codes = first.wait(TIMEOUT), second.wait(TIMEOUT)
    errors = output(workdir, "finished", "err")
    assert codes == (0, 0), errors
    printed = output(workdir, "finished", "out")
    assert f"continuing from the checkpoint of step {step}" in printed[0] and printed[1] == ""
    assert "2 process(es), 4 cpu device(s) | batch 32 (8 a device)" in printed[0]
    assert saved_steps(workdir)[-1] == STEPS
    assert not any("Traceback" in error for error in errors)
    compare(workdir, alone, ("lower", "upper") if method == "advmoe" else ("train",))


@pytest.mark.slow
def test_kill_and_another_config(tmp_path):
    """Whoever is killed, the other says so in a line, and the same command goes on to the same bits."""
    whole, workdir = tmp_path / "whole", tmp_path / "w"
    with cluster(whole, "at_sdense", "whole") as processes:
        assert [running.wait(TIMEOUT) for running in processes] == [0, 0]
    with cluster(workdir, "at_sdense", "other", second_seed=1) as processes:
        assert [running.wait(TIMEOUT) for running in processes] == [2, 2]
    for error in output(workdir, "other", "err"):
        assert error.splitlines()[1:] == ["error: processes 0 and 1 differ: seed 0 and 1; expected the same command "
                                          "and the same code in every process"]
    for victim, step in (1, 3), (0, 10):
        with cluster(workdir, "at_sdense", "killed") as processes:
            wait_until(logged(workdir, step), processes[0], f"step {step}")
            processes[victim].kill()
            assert processes[1 - victim].wait(60) == 75
        said = output(workdir, "killed", "err")[1 - victim]
        assert f"error: process {victim} is gone; the same command in every process continues\n" in said
        assert victim == 0 or said.count("\n") == 2  # jax sees process 0 go as soon, and may say so
    with cluster(workdir, "at_sdense", "finished") as processes:
        assert [running.wait(TIMEOUT) for running in processes] == [0, 0]
    assert_same_bits(workdir, whole)


@pytest.mark.parametrize("change, name", [
    (["--config.seed=1"], "seed"), (["--config.eval.n=19"], "eval.n"), (["--workdir", "elsewhere"], "--workdir"),
    (["--mode", "evaluate"], "--mode"), (["--config.data.dir=data"], None)])
def test_what_must_be_the_same_in_every_process(change, name, tmp_path):
    def facts(*more):
        parsed, overrides = main.parse([*flags(tmp_path, model__depth=10), *more])
        return modes._facts(parsed, path(parsed.workdir), {"": modes._with(modes._load(parsed), overrides)})

    ours, theirs = facts(), facts(*change)
    assert [key for key in ours if ours[key] != theirs[key]] == ([name] if name else [])


def compare(ours, theirs, updates):
    """Losses to 1e-4 while differences of rounding have not grown, then to 1e-3; rates to one image."""
    ours_by_step, theirs_by_step = ({(r["step"], r["split"]): r for r in metrics(folder)} for folder in (ours, theirs))
    assert ours_by_step.keys() == theirs_by_step.keys()
    for (step, split), record in ours_by_step.items():
        for name in [f"{update}/loss" for update in updates] if split == "train" else ():
            tolerance = 1e-4 if step <= 10 else 1e-3
            assert record[name] == pytest.approx(theirs_by_step[step, split][name], rel=tolerance), (step, name)
    assert [entry["id"] for entry in entries(ours)] == [entry["id"] for entry in entries(theirs)]
    for a, b in zip(entries(ours), entries(theirs)):
        for name in ("sa", "ra"):
            assert abs(a[name] - b[name]) <= 1 / a["n"] + 1e-9, (a["id"], name)
