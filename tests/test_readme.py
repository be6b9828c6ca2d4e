"""Every command of the READMEs runs, in a folder like a fresh clone, made small; and what they say of files holds."""

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from PIL import Image
from test_floors import FLOORS
from tiny import FIELDS, fields_of

from advmoe_jax import main, modes
from advmoe_jax.bench import __main__ as bench
from advmoe_jax.bench import attacks as attacks_bench
from advmoe_jax.bench import compile as compile_bench
from advmoe_jax.bench import conv, edge, growth, layers, mixture, nets, reference, routing
from advmoe_jax.bench import input as input_bench
from advmoe_jax.bench import pruning as pruning_bench
from advmoe_jax.bench import train as train_bench
from advmoe_jax.core import config as configs
from advmoe_jax.core import fields, find, recipe, status
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.data import images, prepare
from advmoe_jax.evaluation import autoattack, flags, suites
from advmoe_jax.interop import torch_import
from advmoe_jax.models import network
from advmoe_jax.pruning import pruned
from advmoe_jax.report import curves, macs
from advmoe_jax.report import routing as routing_report
from advmoe_jax.systems import mask_search

pytestmark = pytest.mark.usefixtures("tiny_resnet")
ROOT = Path(__file__).parent.parent
README, CONFIGS, BENCH, ATTACKS, PRUNING, LAUNCH, INTEROP = NAMES = (
    "README.md", "configs/README.md", "advmoe_jax/bench/README.md", "advmoe_jax/attacks/README.md",
    "advmoe_jax/pruning/README.md", "launch/README.md", "advmoe_jax/interop/README.md")
LAUNCHERS = "sky", "kubectl", "sbatch", "gcluster"
SMALL_EVAL = ("--config.eval.n=8", "--config.eval.batch_size=16")
# Another AdvMoE would be another minute of compiling.
DENSE = ("--config.system.name=standard", "--config.system.loss=natural", "--config.model.num_experts=1")


def text(name):
    return (ROOT / name).read_text()


def blocks(name, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text(name), re.DOTALL | re.MULTILINE)
    return [block for of, block in found if of == language]


def commands(name):
    """The lines of all bash blocks as lists of words, without comments."""
    lines = [line for block in blocks(name, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def small(words):
    """What makes a command of advmoe_jax.main small."""
    if {"report", "export", "--list", "--list-fields"} & {*words}:
        return ()
    evaluation = SMALL_EVAL if "evaluate" in words else ("--config.eval.attacks=fgsm",)
    if "--config" not in words:
        return evaluation
    file, _, method = words[words.index("--config") + 1].partition(":")
    loaded, more = recipe.load(file), ()
    if isinstance(loaded, Recipe):  # fields that all its runs have, and one of them
        fields, more = FIELDS, () if "--only" in words else ("--only", next(iter(loaded.runs)))
    elif "prune" in file:  # of the weights that import_tiny made
        return ("--config.model.width=1", "--config.system.method=magnitude", "--config.train.length=0 steps",
                "--config.train.select_examples=16", "--config.train.criteria=fgsm", "--config.eval.attacks=fgsm",
                *SMALL_EVAL)
    elif "cifar10" in file:
        fields, more = FIELDS, DENSE
    elif "imagenette" in file:
        fields, more = FIELDS | {"data.image_size": 40, "data.resize": 42}, DENSE
    else:
        fields = fields_of(method or "advmoe")
    return (*(f"--config.{name}={value}" for name, value in fields.items()), *evaluation, *more)


def run_main(words):
    """An export in a format whose package is not there says so; two READMEs show the same one."""
    words = [word.replace("/shared/", "shared/") for word in words]
    allowed = (0, 3) if "--strict" in words else (0,)
    if "export" in words:
        given = dict(word.removeprefix("--config.export.").split("=") for word in words if "=" in word)
        form = given.get("format", "stablehlo")
        shutil.rmtree(given.get("out") or Path(words[words.index("--workdir") + 1]) / "export" / form,
                      ignore_errors=True)
        if form == "onnx" and importlib.util.find_spec("jax2onnx") is None:
            allowed = (2,)
    assert main.main([*words, *small(words)]) in allowed, words


def serve(words):
    spec = importlib.util.spec_from_file_location("serve_example", ROOT / "launch/serve_example.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([*words, "--requests", "2", "--most", "2"]) == 0


def run_bench(words):
    """One that needs a library which is not there says so."""
    missing = "reference" in words and importlib.util.find_spec("torch") is None
    assert bench.main([*words, "--rounds", "1"]) == (2 if missing else 0), words


def prepare_tiny(words):
    """Runs the prepare command on made-up files in place of the real ones."""
    if words[0].startswith("imagefolder"):
        place = Path(words[words.index("--raw") + 1])
        for split, count in (("train", 16), ("val", 4)):
            for label in range(3):
                (place / split / f"n0{label}").mkdir(parents=True)
                for i in range(count):
                    image = np.random.default_rng((label, i)).integers(0, 256, (20, 24, 3), np.uint8)
                    Image.fromarray(image).save(place / split / f"n0{label}" / f"{i}.jpg")
        assert prepare.main(words) == 0
        return
    rows = np.random.default_rng(0).integers(0, 256, (40, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    folder = Path("cifar-10-batches-bin")
    folder.mkdir()
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n")
    subprocess.run(["tar", "-czf", "cifar-10-binary.tar.gz", folder.name], check=True)
    assert prepare.main([*words, "--allow-unknown-hash"]) == 0


def import_tiny(words):
    """Runs the import command on a made-up file of its architecture in place of the real one."""
    cfg = configs.default(model="cifar_resnet").model
    cfg.update(num_experts=1, model_scale=1.0, width=1)
    net = network.make(cfg, (32, 32, 3), 10)
    assert words[words.index("--arch") + 1] == f"resnet{cfg.depth}"
    state = {}
    for spec in net.layers:
        name = torch_import.layer_names(net)[spec.path]
        state[f"{name}.weight"] = np.ones((*spec.kernel[:1:-1], *spec.kernel[:2]) if spec.norm else spec.kernel[::-1])
        norm = torch_import.norm_name(name) if spec.norm else name
        state |= {f"{norm}.{part}": np.ones(spec.width) for part in (
            ("weight", "bias", "running_mean", "running_var") if spec.norm else ("bias",))}
    np.savez("tiny.npz", **state)
    shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)  # two READMEs show the command
    assert torch_import.main(["tiny.npz" if word.endswith(".th") else word for word in words]) == 0


def count(words):
    assert macs.main(words) == 0, words


def run_make(words):
    subprocess.run(["make", *words, "-n"], check=True, capture_output=True, timeout=60)


def check_launch(program, words):
    """What a tool that is not here is given: files that are here, and of the program flags that it has."""
    files = [word for word in words if word.startswith("launch/")]
    assert program == "gcluster" or len(files) == 1 and (ROOT / files[0]).is_file(), words
    if program == "sky":
        known = re.findall(r"^  ([A-Z]+): ", (ROOT / files[0]).read_text(), re.MULTILINE)
        assert {word.partition("=")[0] for flag, word in itertools.pairwise(words) if flag == "--env"} <= {*known}
    elif program != "kubectl":
        inner = (shlex.split(words[words.index("--command") + 1])[4:] if program == "gcluster" else
                 words[words.index(files[0]) + 1:])
        flags, fields = main.parse(inner)
        configs.checked(modes._load(flags), fields)


def look_into_routing(words):
    assert routing_report.main([*words, "--images", "8", "--attack", "pgd(num_steps=1)"]) == 0, words


def draw_curves(words):
    assert curves.main(words) == 0, words


RUN = {"advmoe_jax.main": run_main, "advmoe_jax.data.prepare": prepare_tiny, "advmoe_jax.bench": run_bench,
       "advmoe_jax.interop.torch_import": import_tiny, "advmoe_jax.report.macs": count,
       "advmoe_jax.report.routing": look_into_routing, "advmoe_jax.report.curves": draw_curves,
       "launch/serve_example.py": serve}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with the files that commands name, the sweep of configs/README.md among them."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "Makefile", "setup.cfg", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    [sweep] = blocks(CONFIGS, "python")
    (folder / "configs/sweep.py").write_text(sweep)
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def short_benchmarks(monkeypatch):
    """A case of each, on tiny networks; tests/test_bench.py looks at what they measure."""
    monkeypatch.setattr(nets, "MODEL", {"model.width": 4, "model.depth": 4, "model.router_width": 4})
    monkeypatch.setattr(nets, "IMAGE_SHAPE", (8, 8, 3))
    monkeypatch.setattr(conv, "_CASES", ((2, 8, 3, 4),))
    monkeypatch.setattr(layers, "_SHAPES", ((4, 8),))
    monkeypatch.setattr(layers, "_CASES", layers._CASES[:1])
    monkeypatch.setattr(routing, "_CASES", [(what, model, 8) for what, model, _ in routing._CASES[-2:-1]])
    monkeypatch.setattr(growth, "_BATCHES", (8,))
    monkeypatch.setattr(growth, "_EXPERTS", (2,))
    monkeypatch.setattr(growth, "_BATCH", 8)
    monkeypatch.setattr(train_bench, "_BATCH", 8)
    monkeypatch.setattr(train_bench, "_prepared", lambda *_: (lambda: jnp.zeros(()), (2.0, 1.0)))  # it compiles twice
    for name, value in dict(_SIZE=(40, 30), _IMAGES=8, _BATCH=4, _WORKERS=(0,), _VIEW=images.Config(16, 18)).items():
        monkeypatch.setattr(input_bench, name, value)
    monkeypatch.setattr(train_bench, "program", lambda *_: lambda iterations: jnp.zeros(()))
    monkeypatch.setattr(reference, "_TRAINING", 8)
    monkeypatch.setattr(reference, "_FORWARD", 8)
    monkeypatch.setattr(mixture, "_CASES", ((2, 8),))
    for name, value in dict(_MODEL={"model.depth": 10, "model.width": 4}, _SHAPE=(8, 8, 3), _BATCH=8,
                            _CASES={"natural": ("natural", {})}).items():
        monkeypatch.setattr(compile_bench, name, value)
    for name, value in dict(_RATES={"4x": "1/4"}, _UNITS={"filter": "filter"}, _EXPERTS=2).items():
        monkeypatch.setattr(edge, name, value)
    for name in ("_SEARCHED", "_TIMED"):
        monkeypatch.setattr(pruning_bench, name, {"ResNet-8": dict(name="cifar_resnet", depth=8, width=16)})
    monkeypatch.setattr(pruning_bench, "_BATCH", 4)
    monkeypatch.setattr(pruning_bench.gathered, "FORMS", ("products", "dense"))  # that small networks take
    for name, value in dict(_BATCH=4, _STEPS=2, _EXAMPLES=4, _BATCHES=(32,)).items():
        monkeypatch.setattr(attacks_bench, name, value)


@pytest.fixture
def short_suites(monkeypatch):
    monkeypatch.setattr(suites, "_WORST_CASES", dict.fromkeys(("standard", "fast", "quick"),
                                                              "fgsm square(num_queries=3)"))
    monkeypatch.setattr(suites, "_COLUMNS", {"adaptive": "fgsm adaptive(mode=joint,num_steps=5)"})
    monkeypatch.setattr(flags, "of_model", lambda *_: ())  # test_flags.py; here it would compile for every command


@pytest.mark.parametrize("names", [(README,), pytest.param(NAMES, marks=pytest.mark.slow)], ids=["README", "all"])
def test_commands(names, clone, short_benchmarks, short_suites, monkeypatch, capsys):
    """A command that a README shows and the program refuses fails here."""
    seen, all_of = set(), {
        (README, "make"), (README, "advmoe_jax.main"), (README, "advmoe_jax.data.prepare"),
         *((README, tool) for tool in LAUNCHERS[:3]), (LAUNCH, "gcluster"),
         (CONFIGS, "advmoe_jax.main"), (BENCH, "advmoe_jax.bench"), (CONFIGS, "advmoe_jax.interop.torch_import"),
         *((CONFIGS, f"advmoe_jax.report.{name}") for name in ("macs", "routing", "curves")),
         (ATTACKS, "advmoe_jax.main"), (ATTACKS, "advmoe_jax.bench"), (PRUNING, "advmoe_jax.main"),
         (INTEROP, "advmoe_jax.main"), (INTEROP, "launch/serve_example.py")}
    for name in names:
        for program, *rest in commands(name):
            if program == "python" and rest[1] != "venv":
                program, *rest = rest[1:] if rest[0] == "-m" else rest
                RUN[program](rest)
            elif program == "make":
                run_make(rest)
            elif program in LAUNCHERS:
                check_launch(program, rest)
            else:
                assert name in (LAUNCH, INTEROP) and program in ("python", "pip", "git", "docker"), (name, program)
            seen.add((name, program))
    assert seen >= {of for of in all_of if of[0] in names}
    for path in ("digits_r18/report.md", "dense/report.md", "longer/report.md", "digits_table/report.md",
                 "digits_table/natural-eps0.1-s0/report.md"):
        assert (clone / "runs" / path).exists(), path
    for path in ("longer", "digits_table/natural-eps0.2-s0"):
        assert status.read(clone / "runs" / path).state == "finished", path
    assert BENCH not in names or (clone / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_every_benchmark_has_its_command():
    shown = {words[3] for name in (BENCH, ATTACKS) for words in commands(name) if words[2] == "advmoe_jax.bench"}
    assert shown == {path.stem for path in (ROOT / "advmoe_jax/bench").glob("*.py")
                     if "\ndef measure(" in path.read_text()}


def test_the_sweep_has_the_rows_that_it_promises(clone):
    loaded = recipe.load("configs/sweep.py")
    assert loaded.rows == {f"router_every={every}": tuple(f"every{every}-s{seed}" for seed in (0, 1, 2))
                           for every in (1, 2)}
    assert {(run.system.router_every, run.seed) for run in loaded.runs.values()} == {
        (every, seed) for every in (1, 2) for seed in (0, 1, 2)}


def test_make_runs_what_the_readme_says(clone):
    run = subprocess.run(["make", "-n", "run"], capture_output=True, text=True, check=True).stdout
    assert "python -m advmoe_jax.main --config configs/digits_r18.py" in run
    assert "-m pytest" in subprocess.run(["make", "-n", "test"], capture_output=True, text=True, check=True).stdout


def test_attacks_on_arrays(clone):
    [block] = blocks(README, "python")
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

    names = {"my_module": Flat()}
    exec(next(block for block in blocks(ATTACKS, "python") if "nnx" in block), names)
    logits_fn, x = names["logits_fn"], jax.random.uniform(jax.random.key(2), (6, 8, 8, 3))
    y = jnp.argmax(logits_fn(x), -1)
    assert len(jax.tree.leaves(logits_fn)) == 2, "weights are arguments"
    report = autoattack.run_report(logits_fn, x, y, eps=0.5, suite="apgd(num_steps=5)")
    assert report.standard_accuracy == 1 and report.robust_accuracy == 0


def test_pruning_a_network_of_ones_own(clone):
    [block] = blocks(PRUNING, "python")
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(16, (3, 3)), nn.relu, nn.Conv(8, (3, 3)),
                           lambda x: x.mean((1, 2)), nn.Dense(4)])
    x = jax.random.uniform(jax.random.key(0), (6, 8, 8, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    names = {"model": model, "variables": variables, "params": variables["params"], "x": x, "y": jnp.arange(6) % 4}
    exec(block, names)
    assert names["pruned"].macs[1] < names["pruned"].macs[0] and names["logits"].shape == (6, 4)
    jax.tree.map(np.testing.assert_array_equal, names["params"], names["pruned"].variables["params"])


def test_the_methods_of_pruning_are_listed():
    listed = re.findall(r"^\| `(\w+)` \|", text(PRUNING), re.MULTILINE)
    assert sorted({*listed} - {"method"}) == sorted(find.names(*pruned.ROOM))


def test_the_readme_is_short():
    """It is to be read in five minutes; long tables stand beside what they measure."""
    assert len(text(README).splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name):
    """In code, from the root of the repository; in links, from the file, and with the heading behind the #."""
    named = re.findall(r"`((?:advmoe_jax|configs|launch|tests)/[\w/.]*\w\.(?:py|md|yaml|sbatch))(?::\w+)?`",
                       text(name))
    rooms = "attacks", "models", "data", "pruning", "systems", "interop/exports"
    for path in {*named} - {*(f"advmoe_jax/{room}/NAME.py" for room in rooms), "configs/NAME.py", "configs/sweep.py"}:
        assert (ROOT / path).exists(), path
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text(name)) if "://" not in link]
    assert named or links
    for link in links:
        path, _, heading = link.partition("#")
        file = ((ROOT / name).parent / path).resolve()
        assert file.is_file(), link
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if heading else ()
        assert not heading or heading in [re.sub(r"[^\w -]", "", of).lower().replace(" ", "-") for of in headings], link


def test_fields_that_are_named_exist(clone):
    """A README that calls a field by its old name sends people to an error."""
    known = {field for file in ("digits_r18.py", "digits_r18.py:at_moe", "imagenette_r18.py", "prune_resnet20.py")
             for field in _fields(recipe.load(f"configs/{file}"))} | {
        "data.name", "init_from", "system.coupled", *(f"system.{name}" for name in fields.settings(mask_search.Config))}
    groups = {field.partition(".")[0] for field in known if "." in field}
    for name in NAMES:
        said = set(re.findall(rf"(?:`|--config\.)((?:{'|'.join(groups)})\.[a-z_]+(?:\.[a-z_]+)?)(?=[`=])", text(name)))
        said -= {f"model.{end}" for end in ("onnx", "safetensors", "stablehlo")}  # files
        assert said <= known, said - known


def _fields(config):
    return configs.flatten(config)


def test_the_floors_are_those_of_the_code():
    [block] = [block for block in blocks(README, "") if block.startswith("floor")]
    said = {room: int(floor) for floor, rooms in re.findall(r"^floor (\d)  ([\w, ]+?)  ", block, re.MULTILINE)
            for room in rooms.split(", ")}
    there = {path.stem for path in (ROOT / "advmoe_jax").iterdir() if path.suffix in ("", ".py")} & FLOORS.keys()
    assert said == {room: FLOORS[room] for room in there if not room.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_fill_in(name):
    assert not re.search(r"TODO|[A-Z]+_(TABLE|MINUTES)|table\.sh", text(name))
