"""Two processes on this machine train, are stopped, go on and evaluate as one."""

import contextlib
import re
import signal
import socket

import pytest
from tiny import TIMEOUT, entries, flags, logged, metrics, process, saved_steps, wait_until

pytestmark = pytest.mark.multiprocess
STEPS = 16
METHODS = ("at_sdense", pytest.param("advmoe", marks=pytest.mark.slow))
FIELDS = dict(model__depth=10, train__length=f"{STEPS} steps", train__eval_every="8 steps", train__save_every="8 steps",
              eval__attacks="fgsm", system__loss="madry",
              optim__backbone__learning_rate=0.01)  # so that differences of rounding stay small


@contextlib.contextmanager
def cluster(workdir, method, name):
    """Two processes of two devices each; both are killed in the end."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = [*flags(workdir, method, **FIELDS), "--coordinator", f"localhost:{port}", "--num_processes", "2"]
    with (process([*joined, "--process_id", "0"], folder=workdir.parent, devices=2, name=f"{name}0") as first,
          process([*joined, "--process_id", "1"], folder=workdir.parent, devices=2, name=f"{name}1") as second):
        yield first, second


def output(workdir, name, suffix):
    """What each process wrote, without what the transport says of its connections."""
    transport = re.compile(r"^.*(\[Gloo\]|peer ranks).*\n", re.MULTILINE)  # the lines of two threads may mix
    return [transport.sub("", (workdir.parent / f"{name}{i}.{suffix}").read_text()) for i in (0, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_save_stop_restore_and_evaluate(method, tmp_path):
    alone, workdir = tmp_path / "alone", tmp_path / "w"
    with process(flags(alone, method, **FIELDS), folder=tmp_path, devices=4, name="alone") as running:
        assert running.wait(TIMEOUT) == 0, (tmp_path / "alone.err").read_text()

    with cluster(workdir, method, "stopped") as (first, second):
        wait_until(logged(workdir, 3), second, "step 3")
        second.send_signal(signal.SIGTERM)
        codes = first.wait(TIMEOUT), second.wait(TIMEOUT)
    errors = output(workdir, "stopped", "err")
    assert codes == (75, 75), errors
    stopped = [re.search(r"error: stopped by SIGTERM; saved at step (\d+) of", error) for error in errors]
    assert all(stopped) and len({match[1] for match in stopped}) == 1
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
