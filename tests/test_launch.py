"""What launch/ starts is a command of the program, once on every host, and again after exit code 75 alone."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from exporting import run_of

from advmoe_jax import main, modes
from advmoe_jax.core import config as configs
from advmoe_jax.core import errors

ROOT = Path(__file__).parent.parent
SKY, JOBSET = (yaml.safe_load((ROOT / "launch" / name).read_text()) for name in ("skypilot.yaml", "jobset.yaml"))
PRINT = '#!/bin/bash\nprintf "%s\\n" "$@"\n'


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def shell(folder, script, **environment):
    """Runs a script in a folder whose programs come first."""
    return subprocess.run(["bash", *script], cwd=folder, capture_output=True, text=True,
                          env={"PATH": f"{folder}:/usr/bin:/bin"} | environment)


def accepted(words):
    """The flags of a command that the program takes whole, with its config fields."""
    assert words[:2] == ["-m", "advmoe_jax.main"]
    flags, fields = main.parse(words[2:])
    configs.checked(modes._load(flags), fields)
    return flags


@pytest.mark.parametrize("has_gpus", [True, False])
def test_skypilot(has_gpus, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert SKY["resources"]["job_recovery"]["recover_on_exit_codes"] == [errors.EXIT_PREEMPTED]
    program(tmp_path / "nvidia-smi", f"#!/bin/bash\nexit {0 if has_gpus else 9}\n")
    program(tmp_path / ".venv/bin/python", PRINT)
    environment = SKY["envs"] | dict(
        CONFIG="configs/cifar10_r18.py:at_dense", ARGS="--config.seed=1 --strict", SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1", SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2")
    done = shell(tmp_path, ["-c", SKY["run"]], **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    flags = accepted(done.stdout.splitlines())
    assert flags.strict and flags.workdir == f"{SKY['envs']['ROOT']}/runs/cifar10_r18_at_dense"
    assert (flags.coordinator, flags.num_processes, flags.process_id) == (
        ("10.0.0.1:8476", 2, 1) if has_gpus else ("auto", None, None))
    subprocess.run(["bash", "-n"], input=SKY["setup"], text=True, check=True)
    extras = re.search(r'-e "\.\[(.*)\]"', SKY["setup"])[1].split(",")
    assert all(f"\n{extra} =\n" in (ROOT / "setup.cfg").read_text() for extra in extras)


def test_skypilot_hands_on_the_exit_code(tmp_path):
    program(tmp_path / ".venv/bin/python", "#!/bin/bash\nexit 75\n")
    assert shell(tmp_path, ["-c", SKY["run"]], **SKY["envs"]).returncode == 75


def test_jobset(monkeypatch):
    monkeypatch.chdir(ROOT)
    [job] = JOBSET["spec"]["replicatedJobs"]
    spec, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [errors.EXIT_PREEMPTED]
    assert JOBSET["spec"]["failurePolicy"]["rules"][0] == dict(
        name="preempted", action="RestartJobSetAndIgnoreMaxRestarts", onJobFailureReasons=["PodFailurePolicy"])
    [container] = pod["containers"]
    assert container["command"][0] == "python" and accepted(container["command"][1:]).coordinator == "auto"
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["replicas"] == 1 and spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert (spec["completionMode"], spec["backoffLimit"], pod["restartPolicy"]) == ("Indexed", 0, "Never")


@pytest.mark.parametrize("code, is_requeued", [(0, False), (75, True), (2, False), (137, False)])
def test_slurm(code, is_requeued, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    program(tmp_path / "srun", f'{PRINT}exit {code}\n')
    program(tmp_path / "scontrol", '#!/bin/bash\necho "$@" > requeued\n')
    words = ["--config", "configs/cifar10_r18.py", "--workdir", "/shared/a b"]
    done = shell(tmp_path, [str(ROOT / "launch/slurm.sbatch"), *words], SLURM_SUBMIT_DIR=str(tmp_path),
                 SLURM_JOB_ID="7")
    assert done.returncode == code and not done.stderr, done.stderr
    options, python, *rest = done.stdout.splitlines()
    flags = accepted(rest)
    assert options.startswith("--") and python == ".venv/bin/python"
    assert flags.coordinator == "auto" and flags.workdir == "/shared/a b"
    assert (tmp_path / "requeued").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_slurm_asks_for_a_second_chance():
    script = (ROOT / "launch/slurm.sbatch").read_text()
    assert re.search(r"^#SBATCH --requeue$", script, re.MULTILINE)
    assert re.search(r"^#SBATCH --signal=TERM@\d+$", script, re.MULTILINE), "without B:, which is the shell alone"


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck(tmp_path):
    for name in ("setup", "run"):
        (tmp_path / name).write_text(f"#!/bin/bash\n{SKY[name]}")
    subprocess.run(["shellcheck", "-e", "SC2086", ROOT / "launch/slurm.sbatch", *tmp_path.iterdir()], check=True)


@pytest.mark.usefixtures("tiny_resnet")
def test_requests_are_answered_in_batches(tmp_path, capsys):
    """With the host's dispatch, in threads: every client gets the class of its own image."""
    serve = runpy.run_path(ROOT / "launch/serve_example.py")
    config, model, variables = run_of(tmp_path / "run", "global")
    words = ["--clients", "1,3", "--requests", "4", "--most", "2"]
    assert serve["main"](["--workdir", str(tmp_path / "run"), *words]) == 0
    said = capsys.readouterr().out
    assert "experts: model.dispatch=host" in said
    counts = {int(size): int(count) for size, count in re.findall(r"^\| (\d+) +\| (\d+) +\| \d", said, re.MULTILINE)}
    assert sum(counts.values()) == 4 + 12 and set(counts) <= {1, 2} and "of 16 answers were right" in said
    answer, x, _ = serve["load"](str(tmp_path / "run"), "best")
    found = serve["measure"](answer, x[:8], [3], 4, 2)
    expected = np.argmax(jax.jit(model.in_program().outputs_fn(variables))(x[:8])[0], -1)
    assert {row for row, *_ in found} == set(range(8))
    assert all(guess == expected[row] for row, guess, *_ in found)


@pytest.mark.parametrize("words, said", [
    (["--clients", "0"], "--clients is '0': expected numbers from 1 to 1024"),
    (["--most", "0"], "--most is 0: expected 1 to 65536"), ([], "expected the workdir of a run")])
def test_serving_bad_input(words, said, tmp_path, capsys):
    assert runpy.run_path(ROOT / "launch/serve_example.py")["main"](["--workdir", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err
