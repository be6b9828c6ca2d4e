"""MoL as a recipe, made small: an expert that is pruned, one that is not, their gate, and the report over them."""

import contextlib
import json
import signal

import numpy as np
import pytest
from tiny import FIELDS, REPO, TIMEOUT, arrays, entries, process, saved_steps, wait_until

from advmoe_jax import main
from advmoe_jax.core import locks, status
from advmoe_jax.evaluation import flags as suspicions

pytestmark = [pytest.mark.usefixtures("tiny_resnet"), pytest.mark.slow]
FILE = """
import digits_r18

from advmoe_jax.core import config as configs
from advmoe_jax.core.recipe import Recipe

FIELDS = {fields}


def run(system, init_from="", **fields):
    config = digits_r18.get_config("natural")
    configs.choose(config, system=system)
    config.init_from = init_from
    config.update_from_flattened_dict(FIELDS)
    for name, value in fields.items():
        configs.override(config, name.replace("__", ".") + "=" + str(value))
    return config


def get_recipe():
    runs = dict(clean=run("standard", system__loss="natural"),
                pruned=run("prune", "clean", system__method="magnitude", system__unit="block(4,1)",
                           system__rate="3/4", system__kernels="every"),
                fog=run("standard", system__loss="madry", train__attack="fog"),
                mol=run("mol", "pruned, fog", model__name="mixture", model__num_members=2, model__num_experts=1,
                        model__width=4, model__depth=4, system__loss="madry", train__attack="fgsm fog"))
    return Recipe(runs, "MoL", {{name: (name,) for name in runs}}, oracles=dict(oracle=("pruned", "fog")))
"""
SMALL = FIELDS | {"train.length": "2 steps", "train.eval_every": "0 steps", "eval.suite": "tiny: fgsm fog",
                  "eval.attacks": "pgd", "eval.n": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mol")
    path = folder / "small_mol.py"
    path.write_text(FILE.format(fields=repr(SMALL)))
    (folder / "digits_r18.py").symlink_to(REPO / "configs/digits_r18.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suspicions, "of_model", lambda *_: ())
        assert main.main(["--config", str(path), "--workdir", str(folder / "root")]) == 0
    return folder / "root"


def test_an_expert_is_pruned_by_blocks_and_stays_so_behind_the_gate(root):
    kernels = {name: value for name, value in arrays(root / "mol").items()
               if name.startswith("['params']['expert") and name.endswith("['conv1']['kernel']") and "layer1" in name}
    pruned, whole = kernels.values()
    blocks = pruned.reshape(-1, pruned.shape[-1] // 4, 4).any(-1)
    assert blocks.sum() == blocks.size // 4 and np.count_nonzero(pruned) == 4 * blocks.sum()
    assert np.count_nonzero(whole) == whole.size


def test_the_gate_is_measured(root):
    [entry] = [entry for entry in entries(root / "mol") if entry["checkpoint"] == "best"]
    assert entry["method"] == "mixture of 2 Dense, their last layers trained by madry"
    assert set(entry["ra_by_view"]) >= {"through", "constant"} and len(entry["facts"]["weights_clean"]) == 2
    assert entry["macs"]["pathway"] == sum(entries(root / name)[0]["macs"]["total"] for name in ("pruned", "fog"))
    assert "## Experts" in (root / "mol" / "report.md").read_text()


def test_the_report_has_the_matrix(root):
    text = (root / "report.md").read_text()
    assert "### tiny, 16 test images of digits" in text and (root / "matrix.png").exists()
    [header] = [line for line in text.splitlines() if line.startswith("| attack")]
    assert header.split() == "| attack | clean | pruned | fog | mol | oracle |".split()


@pytest.mark.multiprocess
def test_two_workers_share_it_and_one_is_killed(tmp_path):
    """In the middle of a run. The other takes it from where it was saved, and finishes the recipe."""
    steps, names = 200, ("clean", "pruned", "fog", "mol")
    small = SMALL | {"model.depth": 10, "train.length": f"{steps} steps", "train.save_every": "5 steps",
                     "eval.attacks": "fgsm"}
    (tmp_path / "small_mol.py").write_text(FILE.format(fields=repr(small)).replace("depth=4", "depth=10"))
    (tmp_path / "digits_r18.py").symlink_to(REPO / "configs/digits_r18.py")
    root = tmp_path / "root"
    command = ["--config", str(tmp_path / "small_mol.py"), "--workdir", str(root), "--wait"]
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(process(command, folder=tmp_path, name=name)) for name in ("one", "two"))

        def held():
            return [name for name in names if (locks.holder(root / name) or {}).get("pid") == one.pid
                    and 0 < max(saved_steps(root / name), default=0) < steps // 2]

        wait_until(held, one, "a save of its own")
        [name] = held()
        one.send_signal(signal.SIGKILL)
        one.wait()
        assert saved_steps(root / name)[-1] < steps and status.read(root / name).state == "training"
        assert two.wait(TIMEOUT) == 0, (tmp_path / "two.err").read_text()
    said = {name: (tmp_path / f"{name}.out").read_text() for name in ("one", "two")}
    assert "continuing from the checkpoint of step" in said["two"]
    for name in names:
        assert status.read(root / name).state == "finished"
        logged = [json.loads(line)["step"] for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        assert logged == sorted(logged) and logged[-1] == steps
    assert "### tiny, 16 test images of digits" in (root / "report.md").read_text()
