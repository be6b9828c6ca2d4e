"""A pruned run as a finished run of its compact form: what it computes, what others can do with it, what is refused."""

import functools
import json

import jax
import numpy as np
import pytest

from advmoe_jax import main
from advmoe_jax.core import config as configs
from advmoe_jax.core import paths, status, tree
from advmoe_jax.interop import compact, finished
from advmoe_jax.models import cifar_resnet, network
from advmoe_jax.models import model as models
from advmoe_jax.pruning import pruned, srgkp
from advmoe_jax.report import commands, runs
from advmoe_jax.systems import prune, sources
from advmoe_jax.train import checkpoint

SHAPE, CLASSES = (8, 8, 1), 10  # of digits


@pytest.fixture(scope="module", autouse=True)
def few_layers():
    """A ResNet of one block: most of what runs cost here is compiling their layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar_resnet, "_STAGES", 1)
        yield


@functools.cache
def _masked():
    """The config of a pruning run, its network, and what it left."""
    config = configs.default(data="digits", model="cifar_resnet", system="prune")
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=8", "model.width=16", "system.groups=4",
        "system.rate=1/2", "init_from=base", "attack.eps=0.05", "eval.attacks=pgd(num_steps=2)", "eval.n=16",
        "eval.batch_size=16", "eval.black_box=false"])
    config.name = "tiny"
    net = network.make(config.model, SHAPE, CLASSES)
    variables = jax.device_get(jax.jit(net.init)(jax.random.key(0)))
    subject = pruned.of(lambda variables, x: net.apply(variables, x)[0], variables, net.layers, "1/2")
    return config, net, pruned.choose(subject, "srgkp", srgkp.Config(groups=4))


def _run_of(tmp_path, **plan):
    """The workdir of the pruning run."""
    config, _, of = _masked()
    workdir = tmp_path / "pruned"
    finished.write(finished.free(str(workdir)), config, of.variables, {})
    (workdir / "pruning.json").write_text(json.dumps(prune.report(of, config.system) | plan))
    return workdir


def _command(tmp_path, *words, out="w"):
    return compact.main(["--workdir", str(tmp_path / "pruned"), "--out", str(tmp_path / out), *words])


def test_a_pruned_run(tmp_path, capsys):
    workdir = _run_of(tmp_path)
    assert _command(tmp_path) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}/w: the best checkpoint of {workdir} without zeros, of step 0; of the dense ")
    assert said.count("\n") == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "w"]
    assert status.read(tmp_path / "w").state == "trained"
    config = configs.read(tmp_path / "w" / "config.json")
    configs.check(config)
    assert (config.name, config.model.name, config.model.base, config.model.groups, config.model.rate) == (
        "tiny_compact", "compact", "cifar_resnet", 4, "1/2")
    assert (config.model.width, config.data.name, config.attack.eps, config.eval.n) == (16, "digits", "0.05", 16)
    net = models.make(config.model, SHAPE, CLASSES)
    start = configs.default(data="digits", model="compact", system="standard")
    start.init_from = str(tmp_path / "w")
    variables, masks = sources.initial(net, sources.load(start, SHAPE, CLASSES))
    assert masks == {}
    _, dense, of = _masked()
    x = jax.random.uniform(jax.random.key(1), (4, *SHAPE))
    np.testing.assert_allclose(jax.jit(net.apply)(variables, x)[0], jax.jit(dense.apply)(of.variables, x)[0],
                               rtol=1e-5, atol=1e-5)
    assert f"MACs {dense.costs()['total']:,} to {net.costs()['total']:,}" in said
    assert net.costs()["params"] == dense.costs(of.masks)["params"] == tree.size(variables["params"])
    assert commands.train(runs.load(tmp_path / "w")) == (
        f"python -m advmoe_jax.interop.compact --workdir {workdir} --out {tmp_path}/w --checkpoint best")
    for meta in checkpoint.metas(tmp_path / "w").values():
        assert meta["compacted"] == {"workdir": str(workdir), "checkpoint": "best", "step": 0}


@pytest.mark.slow
def test_it_is_evaluated_and_trained_on(tmp_path):
    """By the command line, as any run."""
    _run_of(tmp_path)
    assert _command(tmp_path, "--checkpoint", "last") == 0
    assert main.main(["--mode", "evaluate", "--workdir", str(tmp_path / "w")]) == 0
    entries = json.loads((tmp_path / "w" / "results.json").read_text())["entries"]
    assert [entry["n"] for entry in entries] == [16, 16]
    assert "python -m advmoe_jax.interop.compact" in (tmp_path / "w" / "report.md").read_text()
    (tmp_path / "more.py").write_text(
        "from advmoe_jax.core import config as configs\n"
        "def get_config():\n"
        f"    config = configs.read(__import__('etils.epath').epath.Path({str(tmp_path / 'w' / 'config.json')!r}))\n"
        f"    config.init_from = {str(tmp_path / 'w')!r}\n"
        "    config.train.length, config.train.select_attack = '1 steps', 'fgsm'\n"
        "    config.train.select_examples = 16\n"
        "    return config\n")
    assert main.main(["--config", str(tmp_path / "more.py"), "--workdir", str(tmp_path / "more")]) == 0
    assert status.read(tmp_path / "more").state == "finished"
    net = models.make(configs.read(tmp_path / "w" / "config.json").model, SHAPE, CLASSES)
    found = []
    for name in ("w", "more"):
        with checkpoint.opened(tmp_path / name, create=False) as saved:
            found.append(tree.named_leaves(saved.restore_trained("last", net.shapes).variables))
    for name, before in found[0].items():
        rests = name.endswith(("/inputs", "/outputs"))
        assert np.array_equal(before, found[1][name]) == rests, name


def _refused(capsys, code):
    assert code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_no_such_run(tmp_path, capsys):
    assert "pruned: expected the workdir of a run" in _refused(capsys, _command(tmp_path))
    workdir = _run_of(tmp_path)
    assert "unknown --checkpoint 'bets': expected one of best, last; did you mean 'best'" in _refused(
        capsys, _command(tmp_path, "--checkpoint", "bets"))
    assert "pruned holds checkpoints: expected a folder that is new or empty" in _refused(
        capsys, _command(tmp_path, out="pruned"))
    status.write(workdir, "training")
    assert "has not finished training" in _refused(capsys, _command(tmp_path))
    status.write(workdir, "trained")
    (workdir / "pruning.json").write_text("{")
    assert "pruning.json cannot be read" in _refused(capsys, _command(tmp_path))
    (workdir / "pruning.json").unlink()
    assert "has no pruning.json: expected a run with system.name=prune" in _refused(capsys, _command(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


@pytest.mark.parametrize("plan, said", [
    (dict(method="l1norm", layers={"layer1.0.conv1": {"kept": [0]}}), "pruned by l1norm, which keeps no groups of"),
    (dict(method="l1norm", layers={}), "pruned by l1norm, which keeps no groups of filters"),
    (dict(rate="1/4"), "keeps [8] input channels in 4 groups: expected 12 in 4")])
def test_another_method_or_plan(plan, said, tmp_path, capsys):
    _run_of(tmp_path, **plan)
    assert said in _refused(capsys, _command(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


def test_a_routed_network(tmp_path, capsys):
    workdir = _run_of(tmp_path)
    config = configs.read(paths.path(str(workdir)) / "config.json")
    config.model.num_experts = 2
    configs.write(config, paths.path(str(workdir)) / "config.json")
    assert "has 2 experts: expected a dense network" in _refused(capsys, _command(tmp_path))
