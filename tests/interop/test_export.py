"""Exports: what comes back is what went out, an artifact is attacked as its run is, and what is refused."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from exporting import CLASSES, KINDS, SHAPE, config_of, images, random_variables, run_of

from advmoe_jax import main
from advmoe_jax.attacks import minimal, objectives
from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import paths, status, tensor_files, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data.split import Arrays
from advmoe_jax.evaluation import measure, results, suites
from advmoe_jax.interop import export, exported
from advmoe_jax.interop.exports import stablehlo
from advmoe_jax.models import model as models
from advmoe_jax.report import commands, runs
from advmoe_jax.systems import sources
from advmoe_jax.train import weights
from advmoe_jax.train.state import Trained

pytestmark = pytest.mark.usefixtures("tiny_resnet")


def _command(workdir, form, *words):
    return main.main(["--mode", "export", "--workdir", str(workdir), f"--config.export.format={form}", *words])


def _refused(capsys, code):
    assert code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def _card(folder):
    """The YAML and the Markdown of a card."""
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def _programs(tmp_path, kind, *words, seed=0):
    """A network, its variables, and the model that its programs make."""
    config = config_of(kind, *(f"export.{word}" for word in words))
    model = models.make(config.model, SHAPE, CLASSES)
    variables = random_variables(model, seed)
    of = export.Export(config, paths.path(str(tmp_path)), model, Trained(variables, {}), "best", 0)
    stablehlo.write(of, paths.path(str(tmp_path)))
    return model, variables, exported.of(model, paths.path(str(tmp_path)))


def _assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_weights_come_back(tmp_path, capsys):
    """As a run that others start from, and that is exported again, without its data."""
    config, model, variables = run_of(tmp_path / "run", "routed")
    assert _command(tmp_path / "run", "safetensors", "--checkpoint", "last") == 0
    folder = tmp_path / "run" / "export" / "safetensors"
    assert capsys.readouterr().out == (f"{folder}: the last checkpoint of {tmp_path}/run, of step 0, as safetensors; "
                                       "its README.md says how it is used\n")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors",
                                                              "status.json"]
    names = tensor_files.read(folder / "model.safetensors").keys()
    assert {"params.backbone.layer1_0.conv1.kernel", "batch_stats.backbone.bn1.mean"} < names
    assert json.loads(tensor_files.about(folder / "model.safetensors")["config"]) == configs.to_json(config)
    start = configs.default(data="digits", system="standard")
    start.init_from = str(folder)
    found, masks = sources.initial(model, sources.load(start, SHAPE, CLASSES))
    assert masks == {} and jax.tree.structure(found) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    assert commands.train(runs.load(folder)) == (
        f"python -m advmoe_jax.main --mode export --workdir {tmp_path}/run --checkpoint last "
        f"--config.export.format=safetensors --config.export.licence=mit --config.export.out={folder}")
    assert _command(folder, "safetensors", "--config.data.dir=nowhere", f"--config.export.out={tmp_path}/again") == 0
    again = weights.origin(tmp_path / "again")
    assert (again.checkpoint, again.workdir) == ("last", str(folder))
    assert (tmp_path / "again" / "model.safetensors").stat().st_size
    assert tree.first_difference(tensor_files.read(folder / "model.safetensors"),
                                 tensor_files.read(tmp_path / "again" / "model.safetensors")) is None


def test_masks_come_back(tmp_path):
    model = models.make(config_of("dense").model, SHAPE, CLASSES)
    variables = random_variables(model)
    mask = np.arange(36).reshape(3, 3, 1, 4) % 2 == 0
    masks = {"backbone": jax.tree.map(lambda _: None, variables["params"]["backbone"])}
    masks["backbone"]["conv1"]["kernel"] = mask
    weights.write(paths.path(str(tmp_path)), Trained(variables, masks), weights.Origin(
        "w", "best", 3, SHAPE, CLASSES, {}), {})
    saved = weights.Weights(paths.path(str(tmp_path)))
    found = saved.restore_trained("3", model.shapes, meshes.replicated(meshes.make()))
    jax.tree.map(np.testing.assert_array_equal, found, Trained(variables, masks))
    assert model.costs(found.masks) == model.costs(masks) != model.costs()
    with pytest.raises(UserError, match="unknown checkpoint of an export 'last': expected one of 3, best"):
        saved.step("last")


def test_a_card(tmp_path):
    """What the Hub reads, and what people do."""
    run_of(tmp_path / "run", "dense")
    entry = dict(
        checkpoint="best", step=0, seed=0, train_seed=0, config="a", method="b", selected_on="test", data="digits",
        macs=dict(pathway=9, router=1, total=10, executed=10, params=7), precision={}, backend="cpu",
        versions={"advmoe_jax": "0.0.9", "jax": "0.9"}, attack="pgd-50", norm="linf", eps="0.1", eps_value=.1,
        settings={"a": "1"}, asked={}, n=40, sa=.9, sa_interval=[.8, .95], ra=.5, ra_interval=[.4, .6], attempts=[],
        unreliable=True, flags=[dict(name="f", reason="the slope is 0", unreliable=True)], facts={}, fact_tables=[],
        ra_by_view={})
    results.add(tmp_path / "run", [entry, entry | {"eps": "8/255", "ra": .25}, entry | {"checkpoint": "last", "n": 9}])
    assert _command(tmp_path / "run", "safetensors", "--config.export.licence=cc-by-4.0") == 0
    head, body = _card(tmp_path / "run" / "export" / "safetensors")
    assert {name: head[name] for name in ("library_name", "pipeline_tag", "license", "datasets")} == {
        "library_name": "advmoe_jax", "pipeline_tag": "image-classification", "license": "cc-by-4.0",
        "datasets": ["digits"]}
    [model], = [head["model-index"]]
    [result] = model["results"]
    assert model["name"] == "tiny_dense" and result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"type": "digits", "name": "digits", "split": "test"}
    assert [(metric["type"], metric["name"], metric["value"]) for metric in result["metrics"]] == [
        ("accuracy", "accuracy, 40 test images, seed 0", .9),
        ("accuracy", "robust accuracy, pgd-50, linf eps 1/10, of advmoe_jax 0.0.9, 40 test images, seed 0", .5),
        ("accuracy", "robust accuracy, pgd-50, linf eps 8/255, of advmoe_jax 0.0.9, 40 test images, seed 0", .25)]
    for said in ("| pgd-50 | linf | 8/255 | 90.00 [80.00, 95.00] | 25.00 [40.00, 60.00] | 40 ",
                 "UNRELIABLE: the slope is 0.", "| 9             | 1            | 10          | 7          |",
                 "model.width: 4"):
        assert said in body, said


def test_programs_are_those_of_every_gradient(tmp_path):
    """For any number of images."""
    model, variables, found = _programs(tmp_path, "routed", "platforms=cpu", seed=7)
    assert (found.views, found.kind, found.surfaces) == (model.views, model.kind, {})
    assert len({program.exported.mlir_module_serialized for program in found.programs}) == len(found.views) == 3
    slope = np.random.default_rng(2).standard_normal((12, CLASSES)).astype(np.float32)

    def outputs(of, x):
        logits, pull, aux = jax.vjp(of.outputs_fn(variables, "ste_full"), x, has_aux=True)
        return pull(slope)[0], logits, aux

    ours, theirs = (jax.jit(functools.partial(outputs, of))(images(12)) for of in (model, found))
    _assert_same(ours, theirs)
    assert np.abs(ours[0]).max() > 1e-2 and len(set(np.asarray(ours[2]["expert_ids"])[:, 0])) == 2


def test_an_artifact_is_attacked_as_its_run_is(tmp_path):
    """The same verdict on every image, of several devices."""
    model, variables, found = _programs(tmp_path, "dense", "platforms=cpu, tpu")
    pixels = np.asarray(255 * images(12), np.uint8)
    logits = np.asarray(jax.jit(model.outputs_fn(variables))(pixels / np.float32(255))[0])
    variables["params"]["backbone"]["linear"]["bias"] -= logits.mean(0)
    answers = np.argmax(logits - logits.mean(0), -1)
    assert len(set(answers.tolist())) > 2
    split, suite = Arrays(pixels, answers.astype(np.int32)), suites.together("pgd(num_steps=3)", "linf", "0.05")
    ours, theirs = (measure.run(of, variables, split, np.arange(12), suite, mesh=meshes.make(), batch_size=8, seed=0)
                    for of in (model, found))
    assert 0 < ours.survivors().sum() < 12
    [a], [b] = ours.attempts, theirs.attempts
    _assert_same(a.after, b.after)


def test_a_program_is_mapped_over():
    """As by attacks that ask for the slopes of all logits at once; what is an integer has none."""
    def function(tensors, x):
        return jnp.tanh(x * tensors["a"][None]), {"largest": jnp.argmax(x, -1)}

    shapes = {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}, jax.ShapeDtypeStruct(
        (*jax.export.symbolic_shape("b"), 3), jnp.float32)
    program = exported.Program(jax.export.deserialize(jax.export.export(jax.jit(function))(*shapes).serialize(1)))
    tensors, x = {"a": jnp.arange(1., 4)}, jnp.linspace(-1, 1, 6).reshape(2, 3)
    of = jax.tree_util.Partial(exported.outputs, program, tensors)
    ours, theirs = (jax.jit(lambda x, f=f: minimal.differences(objectives.logits_fn(f), x, jnp.array([0, 2])))(x)
                    for f in (jax.tree_util.Partial(function, tensors), of))
    _assert_same(ours, theirs)
    _assert_same(jax.vmap(of)(jnp.stack([x, -x])), jax.vmap(functools.partial(function, tensors))(jnp.stack([x, -x])))


def test_integer_images(tmp_path):
    """The card's own words load the program and call it."""
    run_of(tmp_path / "run", "dense")
    out = tmp_path / "out"
    assert _command(tmp_path / "run", "stablehlo", "--config.export.input=uint8", f"--config.export.out={out}") == 0
    model, pixels = models.make(config_of("dense").model, SHAPE, CLASSES), np.asarray(255 * images(3), np.uint8)
    [code] = re.findall(r"```python\n(.*?)```", _card(out)[1].partition("## Accuracy")[0], re.DOTALL)
    names = {"images": pixels}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(code, names)
    _assert_same(names["logits"], jax.jit(model.outputs_fn(random_variables(model)))(pixels / np.float32(255))[0])
    with pytest.raises(UserError, match="takes uint8 images and keeps no gradients: expected one that was exported"):
        exported.of(model, paths.path(str(out)))


def test_bad_input(tmp_path, capsys):
    """One line each, and nothing is written."""
    run_of(tmp_path / "run", "ensemble")
    for words, said in (
            (["stablehol"], "unknown export.format 'stablehol': expected one of onnx, safetensors, stablehlo, torch; "
                            "did you mean 'stablehlo'?"),
            (["stablehlo", "--config.export.platforms=cpu,cude"],
             "unknown platform in export.platforms 'cude': expected one of cpu, cuda, rocm, tpu; did you mean 'cuda'"),
            (["torch", "--config.export.platforms=cpu"], "export.platforms is a field of export.format=stablehlo, and"),
            (["torch"], "export.format=torch is for one network, and the model is ensemble of 2 Dense: expected "),
            (["safetensors", f"--config.export.out={tmp_path}/run"], "export.out {}/run holds checkpoints: expected"),
            (["safetensors", "--checkpoint", "7"], "no checkpoint of step 7"),
            (["safetensors", "--config.model.width=8"], "holds a run of another config: model.width 8 (was 4)"),
            (["safetensors", "--coordinator", "a:1"], "--coordinator is for --mode train and evaluate")):
        assert said.format(tmp_path) in _refused(capsys, _command(tmp_path / "run", *words))
    assert "no run in" in _refused(capsys, _command(tmp_path / "none", "torch"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json", "status.json"]


def test_an_export_is_no_place_to_train(tmp_path, capsys):
    run_of(tmp_path / "run", "dense")
    assert _command(tmp_path / "run", "safetensors", f"--config.export.out={tmp_path}/out") == 0
    (tmp_path / "config.py").write_text("from advmoe_jax.core import config as configs\nfrom etils import epath\n"
                                        f"get_config = lambda: configs.read(epath.Path('{tmp_path}/out/config.json'))")
    assert "holds an exported model: expected another --workdir" in _refused(
        capsys, main.main(["--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "out")]))


def _artifact(tmp_path, function):
    """A program of another function, in the place of a dense model's."""
    model = models.make(config_of("dense").model, SHAPE, CLASSES)
    x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *SHAPE), jnp.float32)
    lowered = jax.export.export(jax.jit(function), platforms=["cpu"])(weights.flat(model.shapes), x)
    (tmp_path / "model.stablehlo").write_bytes(lowered.serialize())
    return model


@pytest.mark.parametrize("function, said", [
    (lambda tensors, x: (jnp.linalg.eigh(x[..., 0])[0], {}), "asks for a 'custom_call @lapack_ssyevd_ffi"),
    (lambda tensors, x: (x[:, 0, :, 0], {}), "keeps no gradients")])
def test_a_program_that_is_not_ours(function, said, tmp_path):
    """Only arithmetic is run, and a call is refused before anything is."""
    with pytest.raises(UserError, match=said):
        exported.of(_artifact(tmp_path, function), paths.path(str(tmp_path)))


def test_damaged_files(tmp_path):
    model = models.make(config_of("dense").model, SHAPE, CLASSES)
    (tmp_path / "model.stablehlo").write_bytes(b"no program")
    with pytest.raises(UserError, match=r"model.stablehlo cannot be read .*: expected a program that --mode export"):
        exported.of(model, paths.path(str(tmp_path)))
    weights.write(paths.path(str(tmp_path)), Trained(random_variables(model), {}), weights.Origin(
        "w", "best", 3, SHAPE, CLASSES, {}), {})
    path = tmp_path / "model.safetensors"
    wide = models.make(config_of("dense", "model.width=8").model, SHAPE, CLASSES)
    with pytest.raises(UserError, match=r"of another architecture: batch_stats.backbone.bn1.mean is \(4,\) there, the"):
        weights.Weights(paths.path(str(tmp_path))).restore_trained("best", wide.shapes)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cannot be read .*: expected a safetensors file, all of it"):
        weights.Weights(paths.path(str(tmp_path))).restore_trained("best", model.shapes)
    tensor_files.write(path, {"a": np.zeros(1)}, {})
    with pytest.raises(UserError, match="does not say of which run it is: expected what --mode export wrote"):
        weights.origin(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_evaluated_as_its_run_is(kind, tmp_path):
    """By the command line: the same verdicts in results.json, and the same routes, members and weights of a gate."""
    run_of(tmp_path / "run", kind)
    kept = []
    for folder in (tmp_path / "run", tmp_path / "run" / "export" / "stablehlo"):
        if folder.name == "stablehlo":
            assert _command(tmp_path / "run", "stablehlo") == 0
        assert main.main(["--mode", "evaluate", "--workdir", str(folder), "--checkpoint", "best"]) == 0
        [entry] = results.read(folder)
        kept.append((entry, np.load(folder / "eval" / entry["id"] / "examples.npz")))
    (ours, of_ours), (theirs, of_theirs) = kept
    assert status.read(folder).state == "finished"
    for name in ("id", "sa", "ra", "ra_by_view", "facts"):
        assert ours[name] == theirs[name] or name == "facts", name
    _assert_same(ours["facts"], theirs["facts"])
    assert of_ours.files == of_theirs.files and len({ours["sa"], ours["ra"]} | {1.0}) > 1
    for name in of_ours.files:
        if name != "adversarial_linf":
            np.testing.assert_allclose(of_ours[name], of_theirs[name], rtol=1e-4, atol=1e-4)
