"""Tiny runs on digits: their command lines, processes that run them, and what they leave behind.

They need the fixture tiny_resnet, which processes do not have: there, model__depth=10.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import zlib

import numpy as np
import orbax.checkpoint as ocp

REPO = pathlib.Path(__file__).resolve().parent.parent
DIGITS = str(REPO / "configs" / "digits_r18.py")
TIMEOUT = 600  # seconds; a cold compilation cache on a busy machine
FIELDS = {
    "model.width": 4, "model.depth": 4, "data.batch_size": 32, "train.select_attack": "fgsm",
    "train.select_examples": 20,
    "train.length": "4 steps", "train.eval_every": "2 steps", "train.save_every": "2 steps",
    "train.log_every": "1 steps", "eval.attacks": "fgsm pgd(num_steps=2)", "eval.n": 20, "eval.batch_size": 16,
    "eval.black_box": False}
ATTACKED = {"train.attack": "pgd(num_steps=1,step_size=0.625 eps,start=gaussian,keep=last)"}
ROUTED = {"model.router_width": 4}


def fields_of(method):
    """The fields of a tiny run of a method."""
    return FIELDS | (ATTACKED if method != "natural" else {}) | (ROUTED if method in ("advmoe", "at_moe") else {})


def flags(workdir, method="advmoe", **fields):
    """The command line of a tiny run; a field is written with __ for its dots: model__width=8."""
    fields = fields_of(method) | {name.replace("__", "."): value for name, value in fields.items()}
    return ["--config", f"{DIGITS}:{method}", "--workdir", str(workdir),
            *(f"--config.{name}={value}" for name, value in fields.items())]


def listing(folder):
    """{path: (size, modification time, hash)} of every file below a folder but locks, and {path: None} of folders."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns, zlib.crc32(path.read_bytes()))
            if path.is_file() else None for path in pathlib.Path(folder).rglob("*") if path.name != ".lock"}


def metrics(workdir):
    """The whole records of metrics.jsonl without the speed."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]


def entries(workdir):
    """What results.json holds, without the seconds and the passes that the batch size made necessary."""
    def plain(record):
        return {k: v for k, v in record.items() if k != "seconds" and not k.startswith("executed_")}

    stored = json.loads((pathlib.Path(workdir) / "results.json").read_text())["entries"]
    return [plain(entry) | {"attempts": [plain(attempt) for attempt in entry["attempts"]]} for entry in stored]


def saved_steps(workdir, which="last"):
    """Steps of the whole checkpoints."""
    folder = pathlib.Path(workdir) / "checkpoints" / which
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def forget_configs(workdir):
    """Makes the checkpoints of a run those of a version that kept no config beside them."""
    for path in (pathlib.Path(workdir) / "checkpoints").glob("*/*/meta/metadata"):
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in meta.items() if name not in ("config", "step")}))


def arrays(workdir, which="last"):
    """{name: array} of the newest checkpoint, whatever devices wrote it."""
    path = pathlib.Path(workdir).absolute() / "checkpoints" / which / str(saved_steps(workdir, which)[-1]) / "state"
    with contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        import jax

        tree = reader.metadata(path).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree_util.tree_leaves_with_path(restored)}


def assert_same_bits(ours, theirs):
    """Both checkpoints of two workdirs are bit-equal."""
    for which in ("last", "best"):
        assert saved_steps(ours, which) == saved_steps(theirs, which)
        a, b = arrays(ours, which), arrays(theirs, which)
        assert a.keys() == b.keys() and len(a) > 20
        different = [name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()]
        assert not different, f"{which}: {different[:3]} of {len(different)}"


@contextlib.contextmanager
def process(args, *, folder, devices=1, name="run"):
    """Starts `python -m advmoe_jax.main` with its output in FOLDER/NAME.out and NAME.err; kills it in the end."""
    folder = pathlib.Path(folder)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(REPO), "MPLBACKEND": "Agg"}
    with open(folder / f"{name}.out", "w") as out, open(folder / f"{name}.err", "w") as err:
        started = subprocess.Popen([sys.executable, "-m", "advmoe_jax.main", *args], stdout=out, stderr=err,
                                   cwd=folder, env=environment)
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()


def wait_until(condition, running, what):
    """Returns as soon as `condition()` holds; fails if the process ends first."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert running.poll() is None, f"ended with {running.returncode} before {what}"
        assert time.monotonic() < deadline, f"waited {TIMEOUT} s for {what}"
        time.sleep(0.002)


def logged(workdir, step):
    """A condition: metrics.jsonl has a record of this step or a later one."""
    return lambda: any(record["step"] >= step for record in metrics(workdir))
