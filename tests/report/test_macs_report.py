"""The command that counts: what it shows of configs, recipes, finished runs and the paper's networks, and refuses.

That `--all` gives the released code's numbers, tests/models/test_golden.py shows.
"""

import json
import re

import jax
import numpy as np
import pytest
from tiny import DIGITS

from advmoe_jax.core import config as configs
from advmoe_jax.models import model as models
from advmoe_jax.report import advmoe_costs, macs
from advmoe_jax.train import checkpoint as checkpoints
from advmoe_jax.train import state as states

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SMALL = ("--config.model.depth=4", "--config.model.width=8", "--config.model.router_width=4")
RECIPE = """
from advmoe_jax.core import config as configs
from advmoe_jax.core.recipe import Recipe


def get_recipe():
    runs = {}
    for width in (4, 8):
        for seed in (0, 1):
            config = runs[f"w{width}-s{seed}"] = configs.default(data="digits", system="standard")
            config.model.update(dict(depth=4, width=width, num_experts=1, model_scale=1.0))
            config.system.loss, config.seed = "natural", seed
    return Recipe(runs)
"""


@pytest.fixture
def counted(capsys):
    """What a command prints as JSON."""
    def run(*argv):
        capsys.readouterr()
        assert macs.main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def _rows(text):
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_a_config_with_its_layers(counted, capsys):
    [found] = counted("--config", DIGITS, *SMALL, "--layers")
    assert found["image_shape"] == [8, 8, 1] and found["num_classes"] == 10 and found["model"]["width"] == 8
    assert found["method"] == "MoE, N=2, r=0.5, layer routing" and found["paper"] is None and found["runs"] == []
    of = found["macs"]
    assert of["pathway"] + of["router"] == of["total"] < of["executed"] and 0 < found["router_params"] < found["params"]
    assert sum(layer["macs"] for layer in found["layers"]) == of["total"]
    assert sum(layer["executed"] for layer in found["layers"]) == of["executed"]
    routed = [layer for layer in found["layers"] if layer["routed"]]
    assert len(routed) == 2 and all(layer["executed"] == 2 * layer["macs"] for layer in routed)
    assert macs.main(["--config", DIGITS, *SMALL, "--layers"]) == 0
    out = capsys.readouterr().out
    whole, by_layer = out.split("### resnet 4, width 8, 8x8, 10 classes, MoE")
    assert "paper" not in whole and f"{of['executed']:,}" in _rows(whole)[2]
    params = [int(row[-1].replace(",", "")) for row in _rows(by_layer)[2:]]
    assert len(params) == len(found["layers"]) + 1 and sum(params) == found["params"]


def test_each_model_of_a_recipe_once(counted, tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE)
    found = counted("--config", tmp_path / "mine.py")
    assert [(of["model"]["width"], of["runs"]) for of in found] == [
        (4, ["w4-s0", "w4-s1"]), (8, ["w8-s0", "w8-s1"])]
    found = counted("--config", tmp_path / "mine.py", "--config.model.width=16")
    assert [of["runs"] for of in found] == [["w4-s0", "w4-s1", "w8-s0", "w8-s1"]]


def test_a_finished_run_with_its_masks(counted, tmp_path):
    config = configs.load(f"{DIGITS}:natural")
    config.model.update(dict(depth=4, width=4))
    model = models.make(config.model, (8, 8, 1), 10)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    masks = {"backbone": jax.tree.map(lambda _: None, variables["params"]["backbone"])}
    masks["backbone"]["layer1_0"]["conv1"]["kernel"] = np.arange(4) < 1
    with checkpoints.opened(tmp_path / "w") as saved:
        saved.save("best", 0, states.fresh(variables, {}, masks), {})
    configs.write(config, tmp_path / "w" / "config.json")
    (tmp_path / "w" / "status.json").write_text('{"state": "trained"}')
    [dense], [pruned] = counted("--config", f"{DIGITS}:natural", *SMALL[:1], "--config.model.width=4"), counted(
        "--workdir", tmp_path / "w")
    gone = 9 * 4 * 3
    assert pruned["params"] == dense["params"] - gone and pruned["macs"]["executed"] == dense["macs"]["executed"]
    assert pruned["macs"]["pathway"] == pruned["macs"]["total"] == dense["macs"]["total"] - gone * 64


def test_the_papers_figures_stand_beside(monkeypatch, capsys):
    cases = {(case.network, case.num_experts, case.model_scale): case for case in advmoe_costs.CASES}
    monkeypatch.setattr(advmoe_costs, "CASES", [cases["DenseNet-BC-40, CIFAR-10", 1, .5], cases[
        "VGG-16, CIFAR-10", 2, .5]])
    assert macs.main(["--all"]) == 0
    out = capsys.readouterr().out
    assert [row[-2:] for row in _rows(out)[2:]] == [["0.02", "+0.00"], ["0.12", "-0.04 / +0.00"]]
    assert "7,690,218 + 269,202" in out and all(note in out for note in advmoe_costs.NOTES)


def test_which_networks_are_the_papers():
    """A mixture whatever its routers are; no other width, form or image."""
    def figure(name="resnet", side=32, **fields):
        cfg = configs.default(model=name).model
        cfg.update(fields)
        return advmoe_costs.figure(cfg, (side, side, 3))

    assert figure() == figure(routing="global", experts="disjoint", mean="0 0 0", std="1 1 1") == .15
    assert figure(model_scale=.8) == .37 and figure(side=64) == .75 and figure("wide_resnet", 64) == 7.44
    assert figure("vgg", form="released") == .12
    assert {figure(width=32), figure(num_experts=3), figure(side=128), figure("vgg"), figure("cifar_resnet")} == {None}


@pytest.mark.parametrize("argv, said", [
    ([], "nothing is given: expected one of --config FILE, --workdir DIR and --all"),
    (["--all", "--config", DIGITS], "--config and --all are given"),
    (["--all", "--workdir", "w"], "--workdir and --all are given"),
    (["--all", "--config.model.width=8"], "--config.model.width=8 is for --config"),
    (["--al"], "did you mean '--all'"), (["digits"], "unexpected 'digits'"),
    (["--config", DIGITS, "--config.model.widht=8"], "did you mean model.width"),
    (["--config", f"{DIGITS}:advmo"], "did you mean 'advmoe'"),
    (["--config", DIGITS.replace("r18", "r81")], "did you mean"),
    (["--config", DIGITS, "--config.data.name=imagefolder:mine", "--config.data.pad=4"],
     "no prepared imagefolder:mine"),
    (["--config", DIGITS, "--config.model.stem=imagenet"], "images of 8x8 pixels are too small"),
    (["--workdir", "nowhere"], "--workdir is nowhere")])
def test_bad_input_is_one_line(argv, said, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert macs.main(argv) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch(rf"error: [^\n]*{re.escape(said)}[^\n]*\n", err) and not out and not list(tmp_path.iterdir())
