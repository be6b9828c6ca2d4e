"""A run that is stopped, however and whenever, goes on to the same bits."""

import functools
import shutil
import signal

import numpy as np
import pytest
from tiny import TIMEOUT, assert_same_bits, entries, flags, logged, metrics, process, saved_steps, wait_until

LENGTH = dict(model__depth=10, train__length="30 steps", train__eval_every="10 steps", train__save_every="5 steps",
              eval__attacks="fgsm")
DAMAGES = ("truncated arrays", "no arrays", "truncated metadata", "no metadata", "empty folder")


def command(workdir, method):
    """Of those that are attacked, madry compiles soonest."""
    return flags(workdir, method, **LENGTH, **({} if method == "natural" else {"system__loss": "madry"}))


def finish(workdir, method="at_sdense", name="last"):
    """Runs the command to its end; gives what it printed."""
    folder = workdir.parent
    with process(command(workdir, method), folder=folder, name=name) as running:
        assert running.wait(TIMEOUT) == 0, (folder / f"{name}.err").read_text()
    return (folder / f"{name}.out").read_text(), (folder / f"{name}.err").read_text()


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The workdir of a run of a method that nothing stopped; each is trained once."""
    folder = tmp_path_factory.mktemp("complete")

    @functools.cache
    def trained(method="at_sdense"):
        finish(folder / method, method)
        assert saved_steps(folder / method) == [25, 30]
        return folder / method

    return trained


def kill_at(condition, workdir, name, number=signal.SIGKILL, method="at_sdense"):
    """Starts the command, sends a signal as soon as the condition holds; gives the exit code and stderr."""
    with process(command(workdir, method), folder=workdir.parent, name=name) as running:
        wait_until(condition, running, name)
        running.send_signal(number)
        code = running.wait(TIMEOUT)
    return code, (workdir.parent / f"{name}.err").read_text()


def _saves(workdir):
    return saved_steps(workdir)[-1:] >= [10] and any((workdir / "checkpoints" / "last").glob("*tmp*"))


@pytest.mark.slow
def test_killed_while_saving(complete, tmp_path):
    """The shortest of these. tests/train/test_loop.py kills a loop within the process, which every change has to
    pass."""
    workdir = tmp_path / "w"
    assert kill_at(functools.partial(_saves, workdir), workdir, "a save after step 10",
                   method="natural")[0] == -signal.SIGKILL
    printed, _ = finish(workdir, "natural")
    assert "continuing from the checkpoint of step" in printed
    assert_same_bits(workdir, complete("natural"))
    assert metrics(workdir) == metrics(complete("natural"))
    assert entries(workdir) == entries(complete("natural"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at_sdense", "advmoe"])
def test_stopped_at_any_moment(method, complete, tmp_path):
    workdir = tmp_path / "w"

    def evaluating():
        return any((workdir / "eval").glob("best-*"))

    code, error = kill_at(logged(workdir, 7), workdir, "step 7", signal.SIGTERM, method)
    assert code == 75
    step = saved_steps(workdir)[-1]
    assert 7 <= step < 30
    assert error.count("\n") == 1 and f"stopped by SIGTERM; saved at step {step} of 30" in error
    saving = functools.partial(_saves, workdir)
    assert kill_at(saving, workdir, "a save after step 10", method=method)[0] == -signal.SIGKILL
    assert kill_at(evaluating, workdir, "an evaluation", method=method)[0] == -signal.SIGKILL
    printed, _ = finish(workdir, method)
    assert "continuing from the checkpoint of step 30" in printed
    assert_same_bits(workdir, complete(method))
    assert metrics(workdir) == metrics(complete(method))
    assert entries(workdir) == entries(complete(method))
    assert not [path.name for path in workdir.rglob("*") if "tmp" in path.name]


@pytest.mark.slow
def test_ctrl_c(complete, tmp_path):
    workdir = tmp_path / "w"
    for step in (7, 23):
        code, error = kill_at(logged(workdir, step), workdir, f"step {step}", signal.SIGINT)
        assert code == 130
        end, notice = sorted(error.splitlines())  # of two threads, in either order
        assert end.startswith("interrupted; the same command") and notice == "stopping; Ctrl-C again ends at once"
    finish(workdir)
    assert_same_bits(workdir, complete())
    assert entries(workdir) == entries(complete())


@pytest.mark.slow
def test_sigterm_while_evaluating(complete, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(complete(), workdir)
    for name in ("results.json", "report.md"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "eval")
    code, error = kill_at(lambda: any((workdir / "eval").glob("best-*")), workdir, "an evaluation", signal.SIGTERM)
    assert code == 75 and error.count("\n") == 1 and "the same command" in error
    finish(workdir)
    assert entries(workdir) == entries(complete())


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_is_skipped(damage, complete, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(complete(), workdir)
    newest = workdir / "checkpoints" / "last" / "30"
    if damage == "truncated arrays":
        for path in (newest / "state" / "d").glob("*"):
            path.write_bytes(path.read_bytes()[:100])
    elif damage == "no arrays":
        shutil.rmtree(newest / "state" / "d")
    elif damage == "truncated metadata":
        for path in (newest / "state" / "_METADATA", newest / "_CHECKPOINT_METADATA"):
            path.write_bytes(path.read_bytes()[:50])
    elif damage == "no metadata":
        (newest / "state" / "_METADATA").unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    printed, error = finish(workdir)
    assert "continuing from the checkpoint of step 25" in printed
    assert error.startswith("warning: checkpoint 30 cannot be read and is skipped") and error.count("\n") == 1
    assert_same_bits(workdir, complete())
    assert entries(workdir) == entries(complete())


@pytest.mark.slow
def test_kill_in_the_middle_of_an_evaluation(complete, tmp_path):
    """In Square, which is last: what was found before is kept, nothing is attacked twice, and the end is the same."""
    suite = ["--mode", "evaluate", "--checkpoint", "last", "--config.eval.suite=fgsm square(num_queries=300)",
             "--config.eval.batch_size=4", "--config.eval.eps=0.02", "--config.eval.n=100"]
    for name in ("whole", "killed"):
        shutil.copytree(complete(), tmp_path / name)
    with process([*suite, "--workdir", str(tmp_path / "whole")], folder=tmp_path, name="whole") as running:
        assert running.wait(TIMEOUT) == 0, (tmp_path / "whole.err").read_text()

    def lines():
        return [line for path in (tmp_path / "killed" / "eval").glob("last-fgsm*square*/log.jsonl")
                for line in path.read_text().splitlines()]

    with process([*suite, "--workdir", str(tmp_path / "killed")], folder=tmp_path, name="killed") as running:
        wait_until(lambda: any('"square' in line for line in lines()), running, "a batch of Square")
        running.send_signal(signal.SIGKILL)
        running.wait(TIMEOUT)
    before = lines()
    with process([*suite, "--workdir", str(tmp_path / "killed")], folder=tmp_path, name="again") as running:
        assert running.wait(TIMEOUT) == 0, (tmp_path / "again.err").read_text()
    assert lines()[:len(before)] == before and len(lines()) > len(before)
    [ours] = [entry for entry in entries(tmp_path / "killed") if "square" in entry["attack"]]
    [theirs] = [entry for entry in entries(tmp_path / "whole") if "square" in entry["attack"]]
    assert ours == theirs
    for name in ("examples.npz", "adversarial.npz"):
        with (np.load(tmp_path / "killed" / "eval" / ours["id"] / name) as a,
              np.load(tmp_path / "whole" / "eval" / ours["id"] / name) as b):
            assert a.files == b.files and all(np.array_equal(a[key], b[key]) for key in a.files)
