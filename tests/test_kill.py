"""A run that is stopped, however and whenever, goes on to the same bits."""

import shutil
import signal

import pytest
from tiny import TIMEOUT, assert_same_bits, entries, flags, logged, metrics, process, saved_steps, wait_until

LENGTH = dict(train__length="30 steps", train__eval_every="10 steps", train__save_every="5 steps",
              eval__attacks="fgsm pgd(num_steps=2)")
METHOD = "advmoe"


def command(workdir, method=METHOD):
    return flags(workdir, method, **LENGTH)


def finish(workdir, name="last"):
    """Runs the command to its end; gives what it printed."""
    folder = workdir.parent
    with process(command(workdir), folder=folder, name=name) as running:
        assert running.wait(TIMEOUT) == 0, (folder / f"{name}.err").read_text()
    return (folder / f"{name}.out").read_text(), (folder / f"{name}.err").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The workdir of a run that nothing stopped."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "w"
    finish(workdir)
    assert saved_steps(workdir) == [25, 30]
    return workdir


def kill_at(condition, workdir, name, number=signal.SIGKILL):
    """Starts the command, sends a signal as soon as the condition holds; gives the exit code and stderr."""
    with process(command(workdir), folder=workdir.parent, name=name) as running:
        wait_until(condition, running, name)
        running.send_signal(number)
        code = running.wait(TIMEOUT)
    return code, (workdir.parent / f"{name}.err").read_text()


def test_kill_at_any_moment(uninterrupted, tmp_path):
    workdir = tmp_path / "w"

    def saving():
        return saved_steps(workdir)[-1:] >= [10] and any((workdir / "checkpoints" / "last").glob("*tmp*"))

    def evaluating():
        return any((workdir / "eval").glob("best-*"))

    assert kill_at(logged(workdir, 7), workdir, "step 7")[0] == -signal.SIGKILL
    assert kill_at(saving, workdir, "a save after step 10")[0] == -signal.SIGKILL
    assert kill_at(logged(workdir, 23), workdir, "step 23")[0] == -signal.SIGKILL
    assert kill_at(evaluating, workdir, "an evaluation")[0] == -signal.SIGKILL
    printed, _ = finish(workdir)
    assert "continuing from the checkpoint of step 30" in printed
    assert_same_bits(workdir, uninterrupted)
    assert metrics(workdir) == metrics(uninterrupted)
    assert entries(workdir) == entries(uninterrupted)
    left = [path.name for path in workdir.rglob("*") if "tmp" in path.name]
    assert not left


def test_sigterm_and_ctrl_c(uninterrupted, tmp_path):
    workdir = tmp_path / "w"
    code, error = kill_at(logged(workdir, 7), workdir, "step 7", signal.SIGTERM)
    assert code == 75
    step = saved_steps(workdir)[-1]
    assert 7 <= step < 30
    assert error.startswith("error: ") is False or error.count("\n") == 1
    assert f"stopped by SIGTERM; saved at step {step} of 30" in error and "Traceback" not in error
    code, error = kill_at(logged(workdir, 23), workdir, "step 23", signal.SIGINT)
    assert code == 130
    assert error.count("\n") == 1 and error.startswith("interrupted; the same command continues")
    finish(workdir)
    assert_same_bits(workdir, uninterrupted)
    validation = [[r for r in metrics(folder) if r["split"] == "validation"] for folder in (workdir, uninterrupted)]
    assert validation[0] == validation[1]
    assert entries(workdir) == entries(uninterrupted)


def test_sigterm_while_evaluating(uninterrupted, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(uninterrupted, workdir)
    for name in ("results.json", "report.md"):
        (workdir / name).unlink()
    shutil.rmtree(workdir / "eval")
    code, error = kill_at(lambda: any((workdir / "eval").glob("best-*")), workdir, "an evaluation", signal.SIGTERM)
    assert code == 75 and error.count("\n") == 1 and "the same command" in error
    finish(workdir)
    assert entries(workdir) == entries(uninterrupted)


@pytest.mark.parametrize("damage", ("truncated arrays", "no arrays", "truncated metadata", "no metadata", "empty folder"))
def test_damaged_newest_checkpoint_is_skipped(damage, uninterrupted, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(uninterrupted, workdir)
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
    assert_same_bits(workdir, uninterrupted)
    assert entries(workdir) == entries(uninterrupted)
