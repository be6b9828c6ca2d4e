"""Every command of the README runs, in a folder like a fresh clone, made small."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FIELDS

from advmoe_jax import main
from advmoe_jax.attacks import autoattack, flags, suites
from advmoe_jax.bench import __main__ as bench
from advmoe_jax.bench import conv as conv_bench
from advmoe_jax.data import prepare

pytestmark = pytest.mark.usefixtures("tiny_resnet")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = tuple(f"--config.{name}={value}" for name, value in FIELDS.items())
SMALL_EVAL = ("--config.eval.n=8", "--config.eval.batch_size=16")
DENSE = ("--config.system.name=standard", "--config.model.num_experts=1")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """The lines of all bash blocks as lists of words, without comments."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_main(words):
    evaluates = "evaluate" in words
    small = () if "report" in words else SMALL_EVAL if evaluates else (*SMALL, "--config.eval.attacks=fgsm")
    if "configs/cifar10_r18.py" in words:
        small += DENSE  # another AdvMoE would be another minute of compiling
    assert main.main([*words, *small]) in ((0, 3) if "--strict" in words else (0,)), words


def prepare_tiny(words):
    """Runs the prepare command on a made-up archive in place of the official one."""
    rows = np.random.default_rng(0).integers(0, 256, (40, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    folder = Path("cifar-10-batches-bin")
    folder.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n")
    subprocess.run(["tar", "-czf", "cifar-10-binary.tar.gz", folder.name], check=True)
    assert prepare.main([*words, "--allow-unknown-hash"]) == 0


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the files that commands name."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "launch", "Makefile", "setup.cfg", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def test_commands(clone, monkeypatch, capsys):
    monkeypatch.setattr(conv_bench, "_CASES", ((2, 8, 3, 4),))
    monkeypatch.setattr(suites, "_WORST_CASES", {"standard": "fgsm square(num_queries=3)"})
    monkeypatch.setattr(suites, "_COLUMNS", {"adaptive": "fgsm adaptive(mode=joint,num_steps=5)"})
    monkeypatch.setattr(flags, "of_model", lambda *_: ())  # test_flags.py; here it would compile for every command
    monkeypatch.setenv("DRY_RUN", "1")
    seen = set()
    for words in commands():
        program = words[0]
        if program == "python":
            module, *rest = words[2:]
            {"advmoe_jax.main": run_main, "advmoe_jax.data.prepare": prepare_tiny,
             "advmoe_jax.bench": lambda rest: bench.main([*rest, "--rounds", "1"])}[module](rest)
            program = module
        elif program == "export":
            assert all("=" in word for word in words[1:])
        else:
            assert program in ("make", "launch/tpu_pod.sh", "launch/table.sh"), words
            if program == "launch/table.sh":
                continue  # test_table
            words = [*words, "-n"] if program == "make" else words
            result = subprocess.run(words, capture_output=True, text=True, timeout=60)
            assert result.returncode == 0, result.stderr
            if program == "launch/tpu_pod.sh":
                assert result.stdout.splitlines()[-1].startswith("gcloud compute tpus tpu-vm"), result.stdout
        seen.add(program)
    assert seen >= {"make", "advmoe_jax.main", "advmoe_jax.data.prepare", "advmoe_jax.bench", "launch/tpu_pod.sh"}
    assert (clone / "runs/digits_r18/report.md").exists()


def test_make_runs_what_the_readme_says(clone):
    run = subprocess.run(["make", "-n", "run"], capture_output=True, text=True, check=True).stdout
    assert "python -m advmoe_jax.main --config configs/digits_r18.py" in run
    assert "-m pytest" in subprocess.run(["make", "-n", "test"], capture_output=True, text=True, check=True).stdout


def test_attacks_on_arrays(clone):
    block = blocks("python")[0]
    kernel = jax.random.normal(jax.random.key(1), (192, 10))
    x = jax.random.uniform(jax.random.key(2), (4, 8, 8, 3))
    names = {"my_apply": lambda w, u: u.reshape(len(u), -1) @ w, "my_variables": kernel, "x": x, "y": jnp.zeros(4, int)}
    for said, small in (("num_steps=50", "num_steps=3"), ("eps=8/255,", "eps=8/255, suite='fgsm',"),
                        ("eps=8/255)", "eps=8/255, suite='fgsm')")):
        assert said in block
        block = block.replace(said, small)
    exec(block, names)
    assert 0 < float(jnp.max(jnp.abs(names["x_adv"] - x))) <= 8 / 255 + 1e-6
    assert names["report"].robust.shape == (4,)


def test_a_module_of_nnx(clone):
    class Flat(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(192, 10, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.linear(x.reshape(len(x), -1))

    names = {"my_module": Flat(), "jax": jax}
    exec(blocks("python")[1], names)
    logits_fn, x = names["logits_fn"], jax.random.uniform(jax.random.key(2), (6, 8, 8, 3))
    y = jnp.argmax(logits_fn(x), -1)
    assert len(jax.tree.leaves(logits_fn)) == 2, "weights are arguments"
    report = autoattack.run_report(logits_fn, x, y, eps=0.5, suite="apgd(num_steps=5)")
    assert report.standard_accuracy == 1 and report.robust_accuracy == 0


def test_named_files_exist():
    for path in re.findall(r"`((?:advmoe_jax|configs|launch|tests)/[\w/.]*\w\.(?:py|sh|md))`", README):
        assert (ROOT / path).exists(), path


def test_no_placeholders():
    assert not re.search(r"TODO|[A-Z]+_(TABLE|MINUTES)", README)
