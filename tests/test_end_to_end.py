"""A tiny run of every method from the command line to the report, and every config file."""

import configparser
import functools
import inspect
import json
import re
import runpy
import shutil

import jax
import numpy as np
import pytest
from cases import slow_but
from ml_collections import ConfigDict
from tiny import REPO, entries, flags, forget_configs, listing, metrics, saved_steps

from advmoe_jax import main
from advmoe_jax.attacks import parse
from advmoe_jax.core import config as configs
from advmoe_jax.core import find, recipe, rng
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Arrays
from advmoe_jax.evaluation import measure, results
from advmoe_jax.models import model, network, normalisation
from advmoe_jax.systems import methods
from advmoe_jax.train import loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
ROUTED = ("advmoe", "at_moe")
METHODS = ("advmoe", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("natural", "at_moe", "at_sdense", "at_dense")))
CONFIG_FILES = sorted(str(path.relative_to(REPO)) for path in (REPO / "configs").rglob("*.py"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a finished run of a method; each is trained once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def trained(method):
        assert main.main(flags(folder / method, method)) == 0
        return folder / method

    return trained


@pytest.mark.parametrize("method", METHODS)
def test_files(method, run):
    workdir = run(method)
    files = listing(workdir)
    assert {"config.json", "metrics.jsonl", "results.json", "report.md", "training.png"} <= files.keys()
    assert ("layers.png" in files) == (method in ROUTED)
    assert saved_steps(workdir, "last") == [2, 4] and saved_steps(workdir, "best") in ([2], [4])
    stored = configs.read(workdir / "config.json")
    assert stored.name == f"digits_r18_{method}" and stored.model.width == 4 and stored.train.length == "4 steps"
    assert stored.file.endswith("configs/digits_r18.py") and stored.argument == method
    assert json.loads((workdir / "status.json").read_text())["state"] == "finished"
    assert not [name for name in files if "tmp" in name or name.startswith(".")]
    for entry in json.loads((workdir / "results.json").read_text())["entries"]:
        folder = workdir / "eval" / entry["id"]
        assert json.loads((folder / "summary.json").read_text()) == entry
        assert {path.name for path in folder.iterdir()} - {"about.json", "log.jsonl"} == {
            "summary.json", "summary.csv", "examples.npz", "examples.csv", "adversarial.npz"}


@pytest.mark.parametrize("method", METHODS)
def test_metrics(method, run):
    records = metrics(run(method))
    train = [record for record in records if record["split"] == "train"]
    validation = [record for record in records if record["split"] == "validation"]
    assert [record["step"] for record in train] == [1, 2, 3, 4]
    assert [record["step"] for record in validation] == [2, 4]
    for record in train:
        for update in ("lower", "upper") if method == "advmoe" else ("train",):
            assert np.isfinite(record[f"{update}/loss"]) and 0 <= record[f"{update}/sa"] <= 1
            if method in ROUTED:
                assert np.allclose(np.sum(record[f"{update}/load"], -1), 1, atol=1e-5)
                assert len(record[f"{update}/flip_rate"]) == len(record[f"{update}/load_entropy"]) == 2
    assert all(0 <= record["ra"] <= record["sa"] <= 1 for record in validation)


@pytest.mark.parametrize("method", METHODS)
def test_results(method, run):
    found = entries(run(method))
    order = [(which, attack) for which in ("best", "last") for attack in ("fgsm", "pgd-2")]
    if saved_steps(run(method), "best")[-1] == saved_steps(run(method))[-1]:  # then both are attacked at once
        order.sort(key=lambda pair: pair[1])
    assert [(entry["checkpoint"], entry["attack"]) for entry in found] == order
    for entry in found:
        assert results.FIELDS.keys() <= entry.keys()
        assert (entry["n"], entry["norm"], entry["eps"], entry["eps_value"]) == (20, "linf", "0.1", 0.1)
        assert entry["seed"] == entry["train_seed"] == 0 and entry["data"] == "digits"
        assert entry["precision"] == {"verdicts": "float32", "attacks": "default"}
        assert {"advmoe_jax", "jax"} == entry["versions"].keys()
        if entry["attack"] == "pgd-2":
            assert entry["settings"]["num_steps"] == "2" and entry["settings"]["restarts"] == "1"
        for rate in ("sa", "ra"):
            low, high = entry[f"{rate}_interval"]
            assert 0 <= low <= entry[rate] <= high <= 1 and high - low > 0.1
        assert entry["ra"] <= min(entry["ra_by_view"].values()) <= entry["sa"]
        assert entry["largest_norm"] <= 0.1 + 1e-5
        assert entry["macs"]["params"] > 100
        pathway, router, total = (entry["macs"][part] for part in ("pathway", "router", "total"))
        assert pathway + router == total and (router > 0) == (method in ROUTED)
        assert len(entry["ra_by_view"]) == (3 if method in ROUTED else 1)
        if method in ROUTED:
            facts = entry["facts"]
            assert np.shape(facts["load"]) == (2, 2) and np.allclose(np.sum(facts["load"], -1), 1)
            assert np.shape(facts["load_entropy"]) == np.shape(facts["flip_rate"]) == (2,)
            assert np.all((0 <= np.array(facts["flip_rate"])) & (np.array(facts["flip_rate"]) <= 1))
            assert [table["title"] for table in entry["fact_tables"]] == ["Routing"]
        else:
            assert entry["facts"] == {} and entry["fact_tables"] == []


@pytest.mark.parametrize("method", METHODS)
def test_examples_give_the_rates(method, run):
    """20 images in batches of 16: the padding of the last batch is not counted."""
    for entry in entries(run(method)):
        with np.load(run(method) / "eval" / entry["id"] / "examples.npz") as examples:
            clean = examples["clean_prediction"] == examples["label"]
            robust = clean & (examples["adversarial_prediction"] == examples["label"]).all(0)
            assert examples["index"].tolist() == list(range(20))
            assert entry["sa"] == clean.mean() and entry["ra"] == robust.mean()
            assert ("clean_experts" in examples) == (method in ROUTED)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_again_changes_nothing(method, run, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("trained or evaluated again")

    workdir = run(method)
    before = listing(workdir)
    monkeypatch.setattr(pipeline, "batch_indices", never)
    monkeypatch.setattr(measure, "run", never)
    assert main.main(flags(workdir, method)) == 0
    after = listing(workdir)
    assert after.keys() == before.keys()
    for name in before:
        if name in ("results.json", "status.json") or name.startswith(("eval/", "checkpoints/")):
            assert after[name] == before[name], name
        elif before[name] and not name.endswith(".png"):
            assert after[name][2] == before[name][2], name


def test_evaluate_adds_and_removes_nothing(run):
    workdir = run("natural")
    before = {entry["id"]: entry for entry in entries(workdir)}
    checkpoints = listing(workdir / "checkpoints")
    command = ["--mode", "evaluate", "--workdir", str(workdir)]
    assert main.main([*command, "--config.eval.attacks=fgsm(norm=l2,eps=0.5) pgd(num_steps=1,restarts=2)"]) == 0
    assert main.main([*command, "--checkpoint", "last", "--config.eval.attacks=fgsm", "--config.eval.n=7"]) == 0
    assert main.main([*command, "--checkpoint", "2", "--config.eval.attacks=fgsm"]) == 0
    after = {entry["id"]: entry for entry in entries(workdir)}
    assert {name: after[name] for name in before} == before
    added = [entry for name, entry in after.items() if name not in before]
    assert [(e["checkpoint"], e["attack"], e["norm"], e["n"]) for e in added] == [
        ("best", "fgsm", "l2", 20), ("best", "pgd-1", "linf", 20), ("last", "fgsm", "l2", 20),
        ("last", "pgd-1", "linf", 20), ("last", "fgsm", "linf", 7), ("2", "fgsm", "linf", 20)]
    assert added[1]["settings"]["restarts"] == "2" and added[-1]["step"] == 2
    assert all((workdir / "eval" / name / "examples.npz").exists() for name in after)
    assert listing(workdir / "checkpoints") == checkpoints
    assert configs.read(workdir / "config.json").eval.attacks == "fgsm pgd(num_steps=2)"
    assert "fgsm, l2 eps 0.5" in (workdir / "report.md").read_text()


def test_evaluate_again_gives_the_same(run):
    """Not measured again unless it is deleted; then, in batches of 8 in place of 16 and 4, the same, each once."""
    workdir, command = run("natural"), ["--mode", "evaluate", "--config.eval.batch_size=8"]
    before = {entry["id"]: entry for entry in entries(workdir)}
    stored = listing(workdir / "eval"), (workdir / "results.json").read_bytes()
    assert main.main([*command, "--workdir", str(workdir)]) == 0
    assert (listing(workdir / "eval"), (workdir / "results.json").read_bytes()) == stored
    shutil.rmtree(workdir / "eval")
    assert main.main([*command, "--workdir", str(workdir)]) == 0
    after = {entry["id"]: entry for entry in entries(workdir)}
    assert after.keys() == before.keys()
    for name, entry in after.items():
        assert entry["largest_norm"] == pytest.approx(before[name]["largest_norm"])
        assert entry | {"largest_norm": 0} == before[name] | {"largest_norm": 0}


def test_an_unreliable_evaluation_says_so(run, monkeypatch, capsys):
    """A model that gives probabilities: in red, in results.json, in the report, and by the exit code if asked for."""
    workdir, apply = run("natural"), network.Network.apply

    def probabilities(*arguments, **more):
        logits, aux = apply(*arguments, **more)
        return jax.nn.softmax(logits), aux

    monkeypatch.setattr(network.Network, "apply", probabilities)
    known = {entry["id"] for entry in entries(workdir)}
    command = ["--mode", "evaluate", "--workdir", str(workdir), "--checkpoint", "last", "--config.eval.attacks=fgsm",
               "--config.eval.n=9", "--config.eval.black_box=true"]
    capsys.readouterr()
    assert main.main([*command, "--strict"]) == 3
    said = capsys.readouterr()
    assert "evaluation UNRELIABLE: the outputs are probabilities" in said.out + said.err
    [added] = [entry for entry in entries(workdir) if entry["id"] not in known]
    assert [attempt["attack"] for attempt in added["attempts"]] == ["fgsm", "square-300"]
    assert added["unreliable"] and "probabilities" in [flag["name"] for flag in added["flags"]]
    assert "the outputs are probabilities" in (workdir / "report.md").read_text()


@pytest.mark.slow
def test_robustbench_and_a_folder_of_another_model(run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(run("natural"), workdir)
    command = ["--mode", "evaluate", "--workdir", str(workdir), "--checkpoint", "last", "--config.eval.n=4"]
    assert main.main([*command, "--config.eval.suite=standard", "--config.eval.eps=0.5"]) == 0
    entry = entries(workdir)[-1]
    told = json.loads((workdir / "eval" / entry["id"] / "robustbench.json").read_text())
    assert told["clean_acc"] == f"{100 * entry['sa']:.2f}" and told["autoattack_acc"] == f"{100 * entry['ra']:.2f}"
    folder = workdir / "eval" / results.entry_id({
        "checkpoint": "last", "attack": "fgsm", "norm": "linf", "eps": "0.1", "n": 4, "seed": 0,
        "settings": parse.attack("fgsm", eps="0.1", norm="linf").settings})
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps({"step": 4, "weights": "of another"}))
    capsys.readouterr()
    assert main.main([*command, "--config.eval.attacks=fgsm"]) == 2
    assert "unfinished evaluation of another model" in capsys.readouterr().err


def test_eps_of_zero_gives_the_standard_accuracy(run):
    workdir = run("natural")
    known = {entry["id"] for entry in entries(workdir)}
    assert main.main(["--mode", "evaluate", "--workdir", str(workdir), "--config.eval.eps=0"]) == 0
    added = [entry for entry in entries(workdir) if entry["id"] not in known]
    assert len(added) == 4 and all(entry["ra"] == entry["sa"] and entry["eps_value"] == 0 for entry in added)


def test_a_suite_is_one_worst_case(run):
    """Every attack of it gets what stands so far, through every view; a curve over eps falls."""
    workdir = run("advmoe")
    known = {entry["id"] for entry in entries(workdir)}
    assert main.main(["--mode", "evaluate", "--workdir", str(workdir), "--checkpoint", "last",
                      "--config.eval.suite=fgsm apgd(num_steps=3) square(num_queries=20)",
                      "--config.eval.eps=0,0.05,0.1"]) == 0
    added = [entry for entry in entries(workdir) if entry["id"] not in known]
    assert [entry["eps"] for entry in added] == ["0", "0.05", "0.1"]
    assert all(entry["attack"] == "fgsm+apgd-ce-3+square-20" and entry["ra_by_view"] == {} for entry in added)
    assert added[0]["ra"] == added[0]["sa"] and added[0]["sa"] >= added[1]["ra"] >= added[2]["ra"]
    for entry in added:
        attempts = entry["attempts"]
        assert [attempt["attack"] for attempt in attempts] == [
            *["fgsm"] * 3, *["apgd-ce-3"] * 3, "square-20"]
        left = round(entry["sa"] * 20)
        for attempt in attempts:
            assert attempt["attacked"] == left
            left -= attempt["broken"]
        assert left == round(entry["ra"] * 20) and attempts[-1]["ra_after"] == entry["ra"]
        folder = workdir / "eval" / entry["id"]
        with np.load(folder / "examples.npz") as examples, np.load(folder / "adversarial.npz") as adversarial:
            broken = examples["index"][examples["broken_by"] >= 0]
            assert adversarial["index"].tolist() == broken.tolist()
        for name, count in (("examples.csv", 20), ("summary.csv", 7)):
            lines = (folder / name).read_text().splitlines()
            assert len(lines) == count + 1 and len({line.count(",") for line in lines}) == 1
    assert "![curve.png](curve.png)" in (workdir / "report.md").read_text() and (workdir / "curve.png").exists()
    assert "RA after %" in (workdir / "report.md").read_text()


def test_report_of_several_runs(run, capsys):
    workdirs = [run("advmoe"), run("natural")]
    before = [listing(workdir) for workdir in workdirs]
    capsys.readouterr()
    assert main.main(["--mode", "report", "--workdir", f"{workdirs[0].parent}/*"]) == 0
    printed = capsys.readouterr().out
    assert "AdvMoE" in printed and "natural Dense" in printed and "pgd-2, linf eps 0.1, 20 test images" in printed
    assert main.main(["--mode", "report", "--workdir", ",".join(map(str, workdirs))]) == 0
    assert [listing(workdir) for workdir in workdirs] == before


def test_report_of_one_run(run):
    workdir = run("natural")
    (workdir / "report.md").unlink()
    assert main.main(["--mode", "report", "--workdir", str(workdir)]) == 0
    assert "fgsm, linf eps 0.1" in (workdir / "report.md").read_text()


def _runs(path, arguments=("",)):
    """{name: config} of every config that a file gives, whatever it is."""
    found = {}
    for argument in arguments:
        loaded = recipe.load(f"{path}:{argument}" if argument else path)
        for config in [loaded] if isinstance(loaded, ConfigDict) else loaded.runs.values():
            found[config.name] = config
    return found


def _arguments(path):
    content = runpy.run_path(path)
    takes = "get_recipe" not in content and inspect.signature(content["get_config"]).parameters
    return ("", *content.get("ARGUMENTS", methods.METHODS)) if takes else ("",)


BUILT, STEPPED = set(), set()
TINY = {"cifar_resnet": dict(depth=8), "vgg": dict(depth=11), "wide_resnet": dict(depth=10),
        "densenet": dict(depth=10), "resnet": dict(depth=4), "vit": dict(depth=2, heads=2)}
BATCH = 8


def _tiny(config):
    """Makes a config small, and gives the shape of its images, which have the size of its data set, and classes."""
    backbone = config.model.get("member") or config.model.get("base") or config.model.name
    config.data.batch_size = BATCH
    config.model.update(dict(width=4) | TINY[backbone] | (
        dict(router_width=4) if config.model.num_experts > 1 else {}))
    shape, classes = pipeline.known(config.data)
    return shape, classes or 10


def _build(config):
    """Builds the model of a config, small and abstractly, unless another config has had the same."""
    images = _tiny(config)
    fields = {name: value for name, value in config.model.items() if f"model.{name}" not in normalisation.NAMES}
    if (kind := str((fields, images))) not in BUILT:
        BUILT.add(kind)
        assert model.output_shapes(model.make(config.model, *images))[0].shape == (1, images[1])


@pytest.mark.parametrize("path", CONFIG_FILES)
def test_config_file(path, monkeypatch):
    """Each run passes its checks, and its model can be built."""
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(str((REPO / path).parent))
    arguments = _arguments(path)
    runs = _runs(path, arguments)
    for config in runs.values():
        configs.check(config)
        assert configs.flatten(config).keys() == configs.flatten(configs.complete(config)).keys()
        assert config.file == path
        configs.override(config, "seed=3")
        assert config.seed == 3
        _build(config)
    assert len(runs) >= len(arguments)
    if len(arguments) > 1:
        with pytest.raises(UserError, match=f"did you mean '{arguments[1]}'"):
            configs.load(f"{path}:{arguments[1][:-1]}")


def _system(config, shape, classes):
    """Of a tiny run, with the data that it draws from and its devices."""
    mesh, count = meshes.make(), 64
    images = Arrays(np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8),
                    np.arange(count, dtype=np.int32) % classes)
    data = pipeline.Data(images, np.arange(count), images, np.arange(4), images, classes, shape)
    net = model.make(config.model, shape, classes, mesh)
    return find.module("systems", config.system.name, defines="make").make(config, net, data, mesh, {}), images, mesh


@pytest.mark.parametrize("path", slow_but(
    lambda path: re.search("/(digits_r18|imagenet_r18|prune_resnet20|hydra_cifar10)", path), CONFIG_FILES))
def test_two_steps_of_a_config_can_be_traced(path, monkeypatch):
    """Without running them, by all arguments that the docstring names; what several configs have in common once. A step
    gives a state of the shapes and types that it takes, so that the second is the same program."""
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(str((REPO / path).parent))
    named = re.findall(rf"--config {path}:(\S+)", runpy.run_path(path)["__doc__"])
    for config in _runs(path, dict.fromkeys((*_arguments(path), *named))).values():
        shape, classes = _tiny(config)
        fields = ("system.name", "system.loss") if config.system.name == "prune" else ("system.",)
        kind = str([value for name, value in configs.flatten(config).items()
                    if name.startswith(("model.", "train.attack", *fields)) and name not in (
                        *normalisation.NAMES, "system.rate")])
        if kind in STEPPED:
            continue
        STEPPED.add(kind)
        system, _, mesh = _system(config, shape, classes)
        batch = {"image": jax.ShapeDtypeStruct((BATCH, *shape), np.uint8),
                 "label": jax.ShapeDtypeStruct((BATCH,), np.int32), "index": jax.ShapeDtypeStruct((BATCH,), np.int32)}
        before = loop.abstract_state(system, mesh)
        for update in system.steps:
            ready = jax.eval_shape(lambda state, batch, u=update: u.prepare(state, batch, u.inputs), before, batch)
            after, metrics = jax.eval_shape(update.update, before, ready)
            assert metrics["loss"].shape == () and jax.tree.structure(after) == jax.tree.structure(before)
            assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] == [
                (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(before)]


@pytest.mark.parametrize("path, method", slow_but(lambda case: case[1] == "natural", [
    ("configs/imagenet_r18.py", "natural"), ("configs/imagenet_r18.py", "advmoe"),
    ("configs/tiny_imagenet_r18.py", "advmoe"), ("configs/cifar100_r18.py", "at_moe"),
    ("configs/paper/advmoe_cifar10_r18_released.py", "advmoe")]))
def test_two_real_steps_of_a_config(path, method):
    """On random images, at most 40 pixels wide. The digits' are trained by the tests above, and those of cifar10 and
    imagenette by tests/test_readme.py."""
    config = configs.load(f"{REPO}/{path}:{method}")
    (*sides, channels), classes = _tiny(config)
    system, images, mesh = _system(config, (*(min(side, 40) for side in sides), channels), classes)
    state = jax.jit(system.init, out_shardings=meshes.replicated(mesh))(rng.key(0, "init"))
    first = jax.device_get(state.params)
    for step in range(2):
        for update in system.steps:
            batch = pipeline.device_batch(mesh, images, np.arange(BATCH) + BATCH * step)
            state, metrics = update.update(state, update.prepare(state, batch, update.inputs))
            assert np.isfinite(metrics["loss"]) and metrics["non_finite"] == -1
        state = state.replace(step=state.step + 1)
    for group, before in first.items():
        assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params[group])))


@pytest.mark.parametrize("path", CONFIG_FILES)
def test_config_file_says_what_it_is(path, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.syspath_prepend(str((REPO / path).parent))
    text = runpy.run_path(path)["__doc__"]
    for word in ("Command:", "Hardware:", "Time:", "Expected:"):
        assert re.search(rf"^{word} +\S", text, re.MULTILINE), word
    assert "TODO" not in text
    commands = re.findall(r"--config (\S+)", text)
    assert commands and all(recipe.load(command) for command in commands)


def test_a_lost_best_checkpoint_is_chosen_again(run, tmp_path):
    """From what the run measures after it continues, whatever the lost one had."""
    workdir = tmp_path / "w"
    shutil.copytree(run("natural"), workdir)
    shutil.rmtree(workdir / "checkpoints" / "last" / "4")
    for step in saved_steps(workdir, "best"):
        shutil.rmtree(workdir / "checkpoints" / "best" / str(step))
    assert main.main(flags(workdir, "natural")) == 0
    assert saved_steps(workdir, "best") == [4]


def test_a_look_in_between_is_not_the_result(tmp_path):
    """What was measured of an earlier step under the name of best or last is measured again."""
    workdir = tmp_path / "w"
    assert main.main(flags(workdir, "natural", train__length="2 steps")) == 0
    before = {entry["checkpoint"]: entry["step"] for entry in entries(workdir)}
    assert before == {"best": 2, "last": 2}
    stored = json.loads((workdir / "config.json").read_text())
    stored["train"]["length"] = "4 steps"
    (workdir / "config.json").write_text(json.dumps(stored))
    forget_configs(workdir)
    assert main.main(flags(workdir, "natural")) == 0
    found = entries(workdir)
    assert {entry["step"] for entry in found if entry["checkpoint"] == "last"} == {4}
    assert {entry["step"] for entry in found if entry["checkpoint"] == "best"} == set(saved_steps(workdir, "best"))
    assert len(found) == 4


def test_config_names_are_unique():
    """Two of one name would share a workdir."""
    names = [path.stem for path in (REPO / "configs").rglob("*.py")]
    assert len(names) == len(set(names))


def test_extras_that_messages_name_exist():
    declared = configparser.ConfigParser()
    declared.read(REPO / "setup.cfg")
    for path in [*(REPO / "advmoe_jax").rglob("*.py"), REPO / "README.md"]:
        for extra in re.findall(r"advmoe_jax\[(\w+)\]", path.read_text()):
            assert extra in declared["options.extras_require"], path
