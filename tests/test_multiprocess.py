"""Two processes on this machine train, are stopped, go on and evaluate as one."""

import contextlib
import re
import signal
import socket
import time

import numpy as np
import pytest
from tiny import TIMEOUT, arrays, assert_same_bits, entries, flags, logged, metrics, process, saved_steps, wait_until

import advmoe_jax
from advmoe_jax import main, modes
from advmoe_jax.core import config as configs
from advmoe_jax.core.paths import path

pytestmark = pytest.mark.multiprocess
STEPS = 16
FIELDS = dict(model__depth=10, train__length=f"{STEPS} steps", train__eval_every="8 steps", train__save_every="8 steps",
              eval__attacks="fgsm", optim__backbone__learning_rate=0.01)  # so that differences of rounding stay small


def command(workdir, method):
    """Of those that are attacked, madry compiles soonest."""
    return flags(workdir, method, **FIELDS, **({} if method == "natural" else {"system__loss": "madry"}))


def cluster(workdir, method, name, *of_second):
    """Two processes of two devices each; both are killed in the end. The second gets more arguments."""
    return pair(command(workdir, method), workdir.parent, name, *of_second)


@contextlib.contextmanager
def pair(words, folder, name, *of_second):
    """As `cluster`, of any command."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = [*words, "--coordinator", f"localhost:{port}", "--num_processes", "2", "--process_id"]
    with (process([*joined, "0"], folder=folder, devices=2, name=f"{name}0") as first,
          process([*joined, "1", *of_second], folder=folder, devices=2, name=f"{name}1") as second):
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
        assert re.match(rf"process {i} of 2: meets the others at localhost:\d+, waits up to 300 s.*\n"
                        rf"process {i} of 2: 2 of 4 devices \(cpu\), process \d+ on ", errors[i])
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
    with cluster(workdir, "at_sdense", "other", "--config.seed=1") as processes:
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
        assert victim == 0 or said.count("\n") == 3  # jax sees process 0 go as soon, and may say so
    with cluster(workdir, "at_sdense", "finished") as processes:
        assert [running.wait(TIMEOUT) for running in processes] == [0, 0]
    assert_same_bits(workdir, whole)


@pytest.mark.slow
def test_goes_on_with_another_number_of_processes_and_devices(tmp_path):
    """After one process was slow for a while, and was waited for. Then an evaluation by two is stopped."""
    alone, workdir = one_process(tmp_path, "natural"), tmp_path / "w"
    with cluster(workdir, "natural", "slow") as (first, second):
        wait_until(logged(workdir, 2), second, "step 2")
        second.send_signal(signal.SIGSTOP)
        time.sleep(5)
        second.send_signal(signal.SIGCONT)
        wait_until(logged(workdir, 5), second, "step 5")
        first.send_signal(signal.SIGTERM)
        assert (first.wait(TIMEOUT), second.wait(TIMEOUT)) == (75, 75), output(workdir, "slow", "err")
    step = saved_steps(workdir)[-1]
    assert 5 <= step < STEPS
    with process(command(workdir, "natural"), folder=tmp_path, name="fewer") as running:
        assert running.wait(TIMEOUT) == 0, (tmp_path / "fewer.err").read_text()
    printed = (tmp_path / "fewer.out").read_text()
    assert f"continuing from the checkpoint of step {step}" in printed and "1 process(es), 1 cpu device(s)" in printed
    compare(workdir, alone, ("train",))

    evaluate = ["--mode", "evaluate", "--workdir", str(workdir), "--checkpoint", "last", "--config.eval.n=64",
                "--config.eval.suite=long: pgd(num_steps=50000,driver=host)"]
    with pair(evaluate, tmp_path, "evaluation") as (first, second):
        wait_until(lambda: "attacking" in (tmp_path / "evaluation0.out").read_text(), second, "an attack")
        time.sleep(5)
        second.send_signal(signal.SIGTERM)
        assert (first.wait(60), second.wait(60)) == (75, 75), output(workdir, "evaluation", "err")
    for said in output(workdir, "evaluation", "err"):
        assert said.endswith("error: stopped by SIGTERM; the same command continues\n")


@pytest.mark.slow
def test_a_search_and_autoattack_after_a_step_are_those_of_one_process(tmp_path):
    """Parameters, scores and momentum to 1e-6; every verdict."""
    with process(command(tmp_path / "dense", "natural"), folder=tmp_path, devices=4, name="dense") as running:
        assert running.wait(TIMEOUT) == 0, (tmp_path / "dense.err").read_text()
    suite = ("apgd(loss=ce,num_steps=4) apgd(loss=dlr,targets=2,num_steps=4) fab(targets=2,num_steps=4) "
             "square(num_queries=20)")

    def search(workdir):
        return flags(workdir, "at_sdense", **FIELDS | dict(
            train__length="1 steps", eval__attacks=suite, model__model_scale=1, system__name="mask_search",
            system__loss="madry", system__rate="3/4", system__learn_rates="true", init_from=tmp_path / "dense"))

    alone, workdir = tmp_path / "alone", tmp_path / "w"
    with process(search(alone), folder=tmp_path, devices=4, name="alone") as running:
        assert running.wait(TIMEOUT) == 0, (tmp_path / "alone.err").read_text()
    with pair(search(workdir), tmp_path, "search") as processes:
        assert [running.wait(TIMEOUT) for running in processes] == [0, 0], output(workdir, "search", "err")
    ours, theirs = arrays(workdir), arrays(alone)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6, err_msg=name)
    [(a, b)] = [(a, b) for a, b in zip(entries(workdir), entries(alone)) if a["checkpoint"] == "last"]
    assert [attempt["attack"] for attempt in a["attempts"]] == [attempt["attack"] for attempt in b["attempts"]]
    assert (a["sa"], a["ra"]) == (b["sa"], b["ra"])


@pytest.mark.slow
@pytest.mark.parametrize("more, words", [
    (["--config.data.batch_size=30"], "data.batch_size is 30: expected a positive multiple of the 4 devices"),
    (["--config.data.name=cifar10", "--config.data.dir=nowhere"], "no prepared cifar10 in nowhere")])
def test_one_line_and_the_exit_code_in_every_process(more, words, tmp_path):
    with pair([*command(tmp_path / "w", "natural"), *more], tmp_path, "bad") as processes:
        assert [running.wait(TIMEOUT) for running in processes] == [2, 2]
    for error in output(tmp_path / "w", "bad", "err"):
        assert [words in line for line in error.splitlines() if line.startswith("error: ")] == [True], error


@pytest.mark.parametrize("change, name", [
    (["--config.seed=1"], "seed"), (["--config.eval.n=19"], "eval.n"), (["--workdir", "elsewhere"], "--workdir"),
    (["--mode", "evaluate"], "--mode"), (["--config.data.dir=data"], None)])
def test_what_must_be_the_same_in_every_process(change, name, tmp_path, monkeypatch):
    def facts(*more):
        parsed, overrides = main.parse([*flags(tmp_path, model__depth=10), *more])
        return modes._facts(parsed, path(parsed.workdir), {"": configs.checked(modes._load(parsed), overrides)})

    ours, theirs = facts(), facts(*change)
    monkeypatch.setattr(advmoe_jax, "__version__", "0.0")
    assert facts()["advmoe_jax"] != ours["advmoe_jax"]
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
