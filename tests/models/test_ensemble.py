"""What every kind of model promises, and what is special to an ensemble."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import measure, suites
from advmoe_jax.models import model as models
from advmoe_jax.models import network
from advmoe_jax.ops import losses

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, BATCH, PASSES = (8, 8, 1), 4, 6, 2
KINDS = {"dense": ("model.num_experts=1", "model.model_scale=1"), "routed": ("model.router_width=4",),
         "ensemble": ("model.name=ensemble", "model.num_experts=1", "model.num_members=3")}
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
    assert bool(model.progress(metrics)) == (kind != "dense") and all(map(str, model.watch(metrics)))


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
    ("routed", "exits", "MoE"), ("routed", "adaptive", ""), ("ensemble", "exits", "")])
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


def test_a_network_has_the_name_of_its_kind():
    assert [_model(kind)[0].kind for kind in KINDS] == ["Dense", "MoE", "ensemble of 3 S-Dense"]
    assert isinstance(_model("ensemble")[0].member, network.Network)
