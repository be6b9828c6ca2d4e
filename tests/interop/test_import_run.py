"""Checkpoint files as finished runs: what is made of each architecture, what is refused, and that nothing is left."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from advmoe_jax import main
from advmoe_jax.core import config as configs
from advmoe_jax.core import status
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import prepare
from advmoe_jax.interop import archs, finished, torch_import
from advmoe_jax.interop.torch_files import Checkpoint
from advmoe_jax.models import network, normalisation
from advmoe_jax.report import commands, runs
from advmoe_jax.systems import sources
from advmoe_jax.train import checkpoint

SHARED = pathlib.Path(__file__).resolve().parents[2].parent / "shared"
WEIGHTS, UNPACK = SHARED / "weights" / "resnet20-12fca82f.th", SHARED / "data" / "unpack_cifar10.py"


@functools.cache
def _state(model, size=32, classes=10, **fields):
    """A random state dict of a narrow network."""
    cfg = configs.default(model=model).model
    cfg.update(dict(num_experts=1, model_scale=1.0, width=4) | fields)
    net, numbers, state = network.make(cfg, (size, size, 3), classes), np.random.default_rng(0), {}
    names = torch_import.layer_names(net)
    for spec in net.layers:
        prefix = "router." if spec.path.startswith("router/") else ""
        layer, norm = prefix + names[spec.path], prefix + torch_import.norm_name(names[spec.path])
        shape = (*spec.kernel[:1:-1], *spec.kernel[:2]) if len(spec.kernel) == 4 else spec.kernel[::-1]
        state[f"{layer}.weight"] = numbers.standard_normal(shape).astype(np.float32)
        if len(shape) == 2 or model == "vgg":
            state[f"{layer}.bias"] = numbers.standard_normal(shape[0]).astype(np.float32)
        for name in ("weight", "bias", "running_mean", "running_var") if spec.norm else ():
            state[f"{norm}.{name}"] = numbers.uniform(.5, 1, spec.width).astype(np.float32)
    return state


def _command(tmp_path, state, *words, arch="resnet20"):
    np.savez(tmp_path / "weights.npz", **state)
    return torch_import.main(["--arch", arch, "--weights", str(tmp_path / "weights.npz"), "--out", str(tmp_path / "w"),
                              *words])


def test_a_finished_run(tmp_path, capsys):
    state = _state("cifar_resnet", shortcut_pad="both")
    assert _command(tmp_path, {f"module.{name}": value for name, value in state.items()}) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}/w: resnet20, 10 classes, data cifar10, images normalised by mean 0.485 0.456 0.406 and std 0.229 "
        "0.224 0.225; a finished run for --mode evaluate and init_from\n")
    assert sorted(path.name for path in (tmp_path / "w").iterdir()) == ["checkpoints", "config.json", "status.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w", "weights.npz"]
    assert status.read(tmp_path / "w").state == "trained"
    config = configs.read(tmp_path / "w" / "config.json")
    configs.check(config)
    model = config.model
    assert (model.name, model.depth, model.width, model.shortcut_pad, model.num_experts, model.mean, model.std) == (
        "cifar_resnet", 20, 4, "both", 1, *normalisation.IMAGENET)
    net = network.make(model, (32, 32, 3), 10)
    with checkpoint.opened(tmp_path / "w", create=False) as saved:
        for which in ("best", "last"):
            assert saved.step(which) == 0
            found = saved.restore_trained(which, net.shapes)
            np.testing.assert_array_equal(found.variables["params"]["backbone"]["layer3_2"]["conv2"]["kernel"],
                                          state["layer3.2.conv2.weight"].transpose(2, 3, 1, 0))
    start = configs.default(data="cifar10", model="cifar_resnet", system="standard")
    start.init_from = str(tmp_path / "w")
    assert sources.initial(net, sources.load(start, (32, 32, 3), 10))[1] == {}
    assert commands.train(runs.load(tmp_path / "w")) == (
        "python -m advmoe_jax.interop.torch_import --arch resnet20 --weights weights.npz "
        f"--out {tmp_path}/w --mean '0.485 0.456 0.406' --std '0.229 0.224 0.225' --data cifar10 --shortcut-pad both")
    for meta in checkpoint.metas(tmp_path / "w").values():
        assert meta["step"] == 0 and meta["imported"]["file"] == "weights.npz" and len(meta["imported"]["sha256"]) == 64


@pytest.mark.parametrize("words, mean, std, pad", [
    (("--shortcut-pad", "end"), "0.4914 0.4822 0.4465", "0.2023 0.1994 0.2010", "end"),
    (("--mean", "", "--std", "", "--data", "svhn"), "", "", "both")])
def test_flags(words, mean, std, pad, tmp_path):
    assert _command(tmp_path, _state("cifar_resnet", width=1), *words) == 0
    config = configs.read(tmp_path / "w" / "config.json")
    assert (config.model.mean, config.model.std, config.model.shortcut_pad, config.data.name) == (
        mean, std, pad, "svhn" if "svhn" in words else "cifar10")


def test_what_the_file_says_of_normalisation_counts(tmp_path):
    state = _state("cifar_resnet", width=1) | {"mean": np.float32([.1, .2, .3]), "std": np.float32([.4, .5, .6])}
    assert _command(tmp_path, state) == 0
    model = configs.read(tmp_path / "w" / "config.json").model
    assert (model.mean, model.std) == ("0.1 0.2 0.3", "0.4 0.5 0.6")


def _file(router=(), **shapes):
    """A checkpoint of the tensors that say the architecture, {name without dots and ".weight": shape}."""
    return Checkpoint({f"{name.replace('__', '.')}.weight": np.ones(shape) for name, shape in shapes.items()},
                      {f"{name}.weight": np.ones(shape) for name, shape in router}, None, None, ())


ROUTER = (("conv1", (16, 3, 3, 3)), ("fc", (4, 64)))


@pytest.mark.parametrize("arch, file, data, mean, fields", [
    ("resnet44", _file(conv1=(2, 3, 3, 3), linear=(100, 8)), "cifar10", normalisation.IMAGENET[0],
     dict(name="cifar_resnet", depth=44, width=2, num_experts=1, model_scale=1)),
    ("vgg13", _file(features__0=(4, 3, 3, 3), classifier=(100, 32)), "cifar10", normalisation.CIFAR10[0],
     dict(name="vgg", depth=13, width=4)),
    ("resnet50", _file(conv1=(64, 3, 7, 7), fc=(100, 2048)), "imagenet", normalisation.IMAGENET[0],
     dict(name="resnet", depth=50, width=64, stem="imagenet")),
    ("advmoe_resnet18", _file(conv1=(12, 3, 3, 3), linear=(100, 102)), "cifar10", "",
     dict(name="resnet", depth=18, width=64, model_scale=.2, stem="cifar", num_experts=1)),
    ("advmoe_resnet18", _file(conv1=(96, 3, 3, 3), linear=(100, 768)), "cifar10", "", dict(width=96, model_scale=1)),
    ("advmoe_resnet18", _file(conv1=(32, 3, 7, 7), fc=(100, 256)), "imagenet", "",
     dict(width=64, model_scale=.5, stem="imagenet")),
    ("advmoe_resnet18", _file(ROUTER, conv1=(8, 3, 3, 3), linear=(100, 20)), "cifar10", "",
     dict(width=8, model_scale=.32, num_experts=4, router_width=16, experts="disjoint", routing="global")),
    ("advmoe_resnet18", _file(ROUTER, conv1=(4, 3, 7, 7), fc=(100, 32)), "imagenet", "",
     dict(width=64, model_scale=.0625, num_experts=4, stem="imagenet"))])
def test_what_an_architecture_is_read_from(arch, file, data, mean, fields):
    found = archs.read(arch, file)
    assert (found.data, found.mean, found.num_classes) == (data, mean, 100)
    assert {name: found.fields[name] for name in fields} == fields


def test_a_mixture(tmp_path):
    state = _state("resnet", num_experts=3, model_scale=.5, width=8, experts="disjoint", routing="global",
                   router_width=4)
    assert _command(tmp_path, state, arch="advmoe_resnet18") == 0
    config = configs.read(tmp_path / "w" / "config.json")
    assert (config.model.num_experts, config.model.width, config.model.model_scale) == (3, 8, .5)


def test_every_architecture_has_names_and_data():
    for arch in archs.names():
        with pytest.raises(UserError, match="^the state dict has no tensor .*weight, which this network needs$"):
            archs.read(arch, Checkpoint({}, {}, None, None, ()))


def _refused(capsys, code):
    assert code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("words, message", [
    (["--arch", "resnet21"], "unknown --arch 'resnet21': expected one of advmoe_resnet18, .*; did you mean 'resnet"),
    (["--shortcut-pad", "ends"], "unknown --shortcut-pad 'ends': expected one of both, end; did you mean 'end'"),
    (["--arch", "resnet50", "--shortcut-pad", "end"], "--shortcut-pad is for ResNets of CIFAR: expected no such flag"),
    (["--mean", "0 0 0"], "--mean is given alone: expected both --mean and --std, or neither"),
    (["--std", "1 1 1"], "--std is given alone"),
    (["--mean", "0 0 0", "--std", "1 0 1"], "--std is '1 0 1': expected numbers above 0"),
    (["--mean", "0 0", "--std", "1 1 1"], "--mean has 2 numbers and --std 3: expected one for each channel in both"),
    (["--mean", "0 0", "--std", "1 1"], "model.mean and model.std have 2 numbers and images 3 channels"),
    (["--data", "cifar11"], "unknown --data 'cifar11': expected one of .*; did you mean 'cifar10'"),
    (["--data", "cifar100"], "the weights are for 10 classes, and cifar100 has 100: expected --data with the name of"),
    (["--arch", "resnet32"], "the state dict has no tensor layer1.3.bn1.running_mean, which this network needs"),
    (["--arch", "vgg16"], "the state dict has no tensor features.0.weight, which this network needs")])
def test_what_is_refused(words, message, tmp_path, capsys):
    state = _state("cifar_resnet", width=1)
    said = _refused(capsys, _command(tmp_path, state, *words))
    assert re.search(message, said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.npz"]


def test_a_deeper_network(tmp_path, capsys):
    said = _refused(capsys, _command(tmp_path, _state("cifar_resnet", width=1, depth=32)))
    assert "unknown tensor layer1.3.bn1.bias (1,) in the state dict: expected only tensors of this network" in said


def test_a_folder_that_holds_something_is_refused_before_the_file_is_read(tmp_path, capsys):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / ".thesis").write_text("")
    words = ["--arch", "resnet20", "--weights", "none.npz", "--out"]
    for out, message in ((tmp_path / "w", "w holds .thesis: expected a folder that is new or empty"),
                         (tmp_path / "w" / ".thesis", ".thesis is a file: expected a folder"),
                         (tmp_path / "w" / ".thesis" / "w", "/.thesis is a file: expected a folder")):
        assert message in _refused(capsys, torch_import.main([*words, str(out)]))
    assert "no checkpoint file none.npz" in _refused(capsys, torch_import.main([*words, str(tmp_path / "new" / "w")]))
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_an_empty_folder_is_taken_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(finished.status, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert _command(tmp_path, _state("cifar_resnet", width=1)) == 130
        assert sorted(path.name for path in tmp_path.iterdir()) == ["w", "weights.npz"]
        assert not list((tmp_path / "w").iterdir())
    assert _command(tmp_path, _state("cifar_resnet", width=1)) == 0
    assert status.read(tmp_path / "w").is_trained


@pytest.mark.slow
@pytest.mark.skipif(not (WEIGHTS.is_file() and UNPACK.is_file()), reason="needs resnet20-12fca82f.th and CIFAR-10")
def test_the_published_resnet20_scores_what_its_authors_say(tmp_path):
    """91.73 % of the 10,000 test images."""
    pytest.importorskip("torch")
    subprocess.run([sys.executable, str(UNPACK), str(tmp_path / "raw")], check=True)
    [raw] = (tmp_path / "raw").iterdir()
    assert prepare.main(["cifar10", "--raw", str(raw), "--out", str(tmp_path / "data")]) == 0
    assert torch_import.main(["--arch", "resnet20", "--weights", str(WEIGHTS), "--out", str(tmp_path / "w")]) == 0
    assert main.main(["--mode", "evaluate", "--workdir", str(tmp_path / "w"), "--checkpoint", "best",
                      f"--config.data.dir={tmp_path / 'data'}", "--config.eval.attacks=fgsm",
                      "--config.eval.black_box=false"]) == 0
    [entry] = json.loads((tmp_path / "w" / "results.json").read_text())["entries"]
    assert (entry["n"], round(entry["sa"], 4)) == (10_000, 0.9173)
    assert (tmp_path / "w" / "report.md").is_file() and os.listdir(tmp_path / "w" / "eval")
