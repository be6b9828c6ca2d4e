"""What every kind of model promises, and what is special to an ensemble."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.tables import Table
from advmoe_jax.data.split import Arrays
from advmoe_jax.evaluation import measure, suites
from advmoe_jax.models import model as models
from advmoe_jax.models import network
from advmoe_jax.models.model import Model
from advmoe_jax.ops import losses

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, BATCH, PASSES = (8, 8, 1), 4, 6, 2
KINDS = {"dense": ("model.num_experts=1", "model.model_scale=1"), "routed": ("model.router_width=4",),
         "ensemble": ("model.name=ensemble", "model.num_experts=1", "model.num_members=3"),
         "team": ("model.name=ensemble", "model.router_width=4", "model.num_members=2"),
         "stopping": ("model.name=team", "model.num_experts=1", "model.num_members=3"),
         "mixture": ("model.name=mixture", "model.num_experts=1", "model.num_members=3"),
         "top": ("model.name=mixture", "model.num_experts=1", "model.num_members=3", "model.serve=top-2"),
         "dual": ("model.name=dual", "model.num_experts=1", "model.num_members=2", "model.gate=linear",
                  "model.serve=top-1")}
each = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def _model(kind):
    config = configs.default()
    configs.override_all(config, ["model.depth=4", "model.width=4", *KINDS[kind]])
    model = models.make(config.model, SHAPE, CLASSES)
    return model, jax.jit(model.init)(jax.random.key(0))


def _images(*begin):
    return jax.random.uniform(jax.random.key(1), (*begin, *SHAPE))


@each
def test_everything_that_the_protocol_names_is_there(kind):
    """What asks for it lies in other rooms, and would fail in the middle of a run."""
    model, variables = _model(kind)
    names = set(Model.__annotations__) | {name for name in vars(Model) if not name.startswith("_")}
    assert {"kind", "layers", "costs", "observe", "train_pass", "gather"} <= names
    assert [name for name in sorted(names) if not hasattr(model, name)] == []
    for name in ("kind", "about"):
        assert isinstance(getattr(model, name), str) and "\n" not in getattr(model, name)
    for name in ("groups", "views", "layers", "image_shape"):
        assert isinstance(getattr(model, name), tuple)
    assert set(model.surfaces) == {"routed": {"routed"}, "mixture": {"gated"}, "top": {"gated"},
                                   "dual": {"gated"}}.get(kind, set())
    assert all(isinstance(surface(variables), jax.tree_util.Partial) for surface in model.surfaces.values())
    assert hash(model) == hash(_model(kind)[0]), "it is a static argument of compiled programs"


@each
def test_a_model_keeps_its_contract(kind):
    model, variables = _model(kind)
    assert model.kind and (model.image_shape, model.num_classes) == (SHAPE, CLASSES)
    assert set(variables["params"]) == set(variables["batch_stats"]) == set(model.groups) == set(model.optim)
    assert set(model.optim.values()) <= {"backbone", "router"}
    outputs = [model.outputs_fn(variables, view)(_images(BATCH)) for view in model.views]
    for logits, aux in outputs:
        assert logits.shape == (BATCH, CLASSES) and all(leaf.shape[0] == BATCH for leaf in aux.values())
        np.testing.assert_array_equal(logits, outputs[0][0])
    paths = [spec.path for spec in model.layers]
    names = tree.named_leaves(variables["params"])
    assert len(paths) == len(set(paths)) and all(f"{path}/kernel" in names for path in paths)
    statistics = tree.named_leaves(variables["batch_stats"])
    for spec in model.layers:
        assert set(spec.inputs) <= set(paths) and (spec.norm is None or f"{spec.norm}/mean" in statistics)
    assert any(spec.norm for spec in model.layers) and any(spec.inputs for spec in model.layers)


@each
def test_a_training_pass(kind):
    model, variables = _model(kind)
    logits, aux, stats = jax.jit(model.train_pass)(variables, _images(BATCH, PASSES))
    assert logits.shape == (BATCH, PASSES, CLASSES) and all(v.shape[:2] == (BATCH, PASSES) for v in aux.values())
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    passes = {name: (logits[:, i], {k: v[:, i] for k, v in aux.items()}) for i, name in enumerate(("clean", "adv"))}
    metrics = jax.device_get(model.metrics(passes))
    assert all(np.all(np.isfinite(value)) for value in metrics.values())
    assert isinstance(model.progress(metrics), str) and "\n" not in model.progress(metrics)
    assert bool(model.progress(metrics)) == (kind != "dense") and all(map(str, model.watch(metrics, BATCH, 1)))


@each
def test_what_an_evaluation_keeps_and_says(kind):
    model, variables = _model(kind)
    _, aux = model.outputs_fn(variables)(_images(BATCH))
    kept = {name: np.asarray(value) for name, value in model.observe(aux).items()}
    assert all(len(value) == BATCH for value in kept.values())
    facts = model.facts(np.zeros(BATCH, int), kept, kept, np.ones(BATCH, bool))
    assert json.loads(json.dumps(facts)) == facts
    for table in model.fact_tables(facts):
        assert all(len(row) == len(table.columns) and all(isinstance(cell, str) for cell in row) for row in table.rows)
        assert set(table.varying) <= set(table.columns)
    costs = model.costs(facts=facts)
    assert json.loads(json.dumps(costs)) == costs
    assert costs.keys() == {"pathway", "router", "total", "executed", "params"}
    tables = [dataclasses.asdict(table) for table in model.fact_tables(facts)]
    assert [Table(**table).title for table in json.loads(json.dumps(tables))] == {
        "dense": [], "routed": ["Routing"], "stopping": ["Members", "Members asked"], "mixture": ["Experts"],
        "top": ["Experts"], "dual": ["Experts of the standard mixture", "Experts of the robust mixture"]}.get(
            kind, ["Members"])
    assert bool(facts) == (kind != "dense")
    assert costs["total"] == costs["pathway"] + costs["router"] and costs["executed"] >= costs["total"]
    assert costs["params"] == tree.size(variables["params"])


def test_an_ensemble_is_the_mean_of_its_members():
    model, variables = _model("ensemble")
    x = _images(BATCH)
    logits, aux = model.outputs_fn(variables)(x)
    alone = [model.member.outputs_fn({part: trees[group] for part, trees in variables.items()})(x)[0]
             for group in model.groups]
    np.testing.assert_allclose(aux["member_logits"], np.stack(alone, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, np.mean(alone, 0), rtol=1e-5, atol=1e-6)
    assert not np.allclose(alone[0], alone[1]), "members start independently"
    single = model.member.costs()
    assert model.costs() == {name: 3 * value for name, value in single.items()}


def test_members_normalise_by_their_own_statistics():
    """Else a member that is frozen would change with the others."""
    model, variables = _model("ensemble")
    x = _images(BATCH, PASSES)
    logits, aux, stats = jax.jit(model.train_pass)(variables, x)
    assert aux["member_logits"].shape == (BATCH, PASSES, 3, CLASSES)
    np.testing.assert_allclose(logits, aux["member_logits"].mean(2), rtol=1e-5, atol=1e-6)
    for i, group in enumerate(model.groups):
        alone, _, own = jax.jit(model.member.train_pass)({part: trees[group] for part, trees in variables.items()}, x)
        np.testing.assert_allclose(aux["member_logits"][:, :, i], alone, rtol=1e-4, atol=1e-5)
        jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6),
                     stats[group], own)
    first, second = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(stats[group])])
                     for group in model.groups[:2])
    assert not np.allclose(first, second)


def test_the_layers_of_an_ensemble_are_those_of_its_members():
    model, _ = _model("ensemble")
    assert len(model.layers) == 3 * len(model.member.layers)
    for i, spec in enumerate(model.layers):
        group, own = model.groups[i // len(model.member.layers)], model.member.layers[i % len(model.member.layers)]
        assert (spec.path, spec.inputs) == (f"{group}/{own.path}", tuple(f"{group}/{path}" for path in own.inputs))
        assert (spec.macs, spec.kernel, spec.norm is None) == (own.macs, own.kernel, own.norm is None)


def test_masked_weights_of_a_member_are_not_counted():
    model, variables = _model("ensemble")
    path = "backbone/layer1_0/conv1"
    mask = np.zeros((3, 3, 1, 1), bool)
    mask[1, 1] = True
    masks = {"member1": {"backbone": {"layer1_0": {"conv1": {"kernel": mask}}}}}
    [spec] = [spec for spec in model.member.layers if spec.path == path]
    dense, sparse = model.costs(), model.costs(masks)
    assert dense["total"] - sparse["total"] == spec.macs * 8 // 9
    assert dense["params"] - sparse["params"] == np.prod(spec.kernel) * 8 // 9


def test_an_ensemble_gathers_a_run_for_each_member():
    model, variables = _model("ensemble")
    parts = [variables["params"][group] for group in model.groups]
    assert model.gather(parts[::-1])["member0"] == parts[2]
    with pytest.raises(UserError, match="init_from names 2 runs: expected 3"):
        model.gather(parts[:2])
    with pytest.raises(UserError, match="expected one, for a network"):
        _model("dense")[0].gather(parts)


def test_members_alone():
    """Members that are right when clean and wrong when attacked count as broken."""
    model, _ = _model("ensemble")
    y, right = np.array([1, 2]), np.array([[1, 1, 0], [2, 0, 0]])
    wrong = np.array([[1, 0, 1], [0, 0, 2]])
    facts = model.facts(y, {"member_predictions": right}, {"member_predictions": wrong}, np.ones(2, bool))
    assert facts == {"member_sa": [1.0, 0.5, 0.0], "member_ra": [0.5, 0.0, 0.0]}


@pytest.mark.parametrize("kind, text, says", [
    ("dense", "adaptive", "Dense"), ("ensemble", "adaptive", "ensemble of 3"), ("dense", "exits", "Dense"),
    ("routed", "exits", "MoE"), ("routed", "adaptive", ""), ("ensemble", "exits", ""), ("team", "exits", ""),
    ("team", "adaptive", "ensemble of 2 MoE"), ("team", "pgd square", ""), ("stopping", "exits square", ""),
    ("mixture", "gated exits", ""), ("dense", "gated", "gated reads member_logits"),
    ("ensemble", "gated", "gated reads gate_logits")])
def test_attacks_that_a_model_can_take(kind, text, says):
    suite = suites.together(text, "linf", "0.1")
    if not says:
        return measure.check(suite, _model(kind)[0])
    with pytest.raises(UserError, match=says):
        measure.check(suite, _model(kind)[0])


def test_exits_attacks_an_ensemble_through_its_members():
    """The loss of every member rises, and not that of the mean alone."""
    model, variables = _model("ensemble")
    x = _images(BATCH)
    outputs_fn = model.outputs_fn(variables)
    y = jnp.argmax(outputs_fn(x)[0], -1)
    [spec] = suites.together("exits(mode=each,num_steps=10,early_stop=false)", "linf", "0.5").specs
    x_adv = spec.run(outputs_fn, jax.random.key(0), x, y)
    before, after = (jax.vmap(losses.cross_entropy, (1, None))(outputs_fn(u)[1]["member_logits"], y).mean(1)
                     for u in (x, x_adv))
    assert np.all(after > before)


def test_an_ensemble_is_evaluated_member_by_member():
    """From images to the record of an evaluation, with exits, which reads the members' logits."""
    model, variables = _model("ensemble")
    images = np.random.default_rng(0).integers(0, 256, (12, *SHAPE)).astype(np.uint8)
    _, aux = model.outputs_fn(variables)(images / np.float32(255))
    for i, group in enumerate(model.groups):  # or one class would be the answer to every image
        linear = variables["params"][group]["backbone"]["linear"]
        linear = linear | {"bias": linear["bias"] - aux["member_logits"][:, i].mean(0)}
        variables = variables | {"params": variables["params"] | {group: variables["params"][group] | {
            "backbone": variables["params"][group]["backbone"] | {"linear": linear}}}}
    logits, aux = model.outputs_fn(variables)(images / np.float32(255))
    labels = np.asarray(jnp.argmax(logits, -1), np.int32)
    assert len(set(labels.tolist())) > 1
    [suite] = suites.alone("exits(mode=average,num_steps=10)", "linf", "0.3")
    found = measure.run(model, variables, Arrays(images, labels), np.arange(12), suite, mesh=meshes.make(),
                        batch_size=12, seed=0)
    record = measure.summarize(found, suite, model)
    assert record["sa"] == 1 and record["ra"] < 0.5
    assert found.clean["member_predictions"].shape == (12, 3)
    right = np.asarray(jnp.argmax(aux["member_logits"], -1)) == labels[:, None]
    assert record["facts"]["member_sa"] == pytest.approx(right.mean(0))
    assert np.all(np.array(record["facts"]["member_ra"]) <= record["facts"]["member_sa"])
    [table] = record["fact_tables"]
    assert table["title"] == "Members" and [row[0] for row in table["rows"]] == ["0", "1", "2"]
    assert all(row[1] == f"{100 * rate:.2f}" for row, rate in zip(table["rows"], record["facts"]["member_sa"]))


def test_a_network_has_the_name_of_its_kind():
    assert [_model(kind)[0].kind for kind in KINDS] == [
        "Dense", "MoE", "ensemble of 3 S-Dense", "ensemble of 2 MoE", "team of 3 S-Dense", "mixture of 3 S-Dense",
        "mixture of 3 S-Dense, the 2 best of the gate",
        "dual model of alpha 0.7, each a mixture of 2 S-Dense, the 1 best of the gate"]
    assert isinstance(_model("ensemble")[0].member, network.Network)
