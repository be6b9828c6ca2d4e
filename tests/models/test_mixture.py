"""Experts behind a gate: what they give together, who is computed, and what is said of the gate.

The networks have one block of width 4 on images of 8x8. What every model promises is in test_ensemble.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import mixture, network
from advmoe_jax.models import model as models
from advmoe_jax.ops import gating
from advmoe_jax.ops.dispatch import Dispatch

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, BATCH, MEMBERS = (8, 8, 1), 4, 12, 3


def _config(*texts):
    config = configs.default(model="mixture", system="mol")
    configs.override_all(config, ["model.depth=4", "model.width=4", "model.num_experts=1", "model.model_scale=1",
                                  "init_from=base", f"model.num_members={MEMBERS}", *texts])
    return config


@functools.cache
def _model(*texts):
    model = models.make(_config(*texts).model, SHAPE, CLASSES)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    if model.gate:  # fresh gates give all images nearly the same weights
        linear = variables["params"]["gate"]["backbone"]["linear"]
        linear["kernel"] = 200 * linear["kernel"]
        linear["bias"] = -np.asarray(_logits_of(model.gate, variables, "gate", _images()).mean(0))
    return model, variables


@functools.cache
def _images():
    return jax.random.uniform(jax.random.key(1), (BATCH, *SHAPE))


def _outputs(model, variables, view="through"):
    return jax.jit(lambda variables, x: model.outputs_fn(variables, view)(x))(variables, _images())


def _logits_of(net, variables, group, x):
    return _applied(net, {part: trees[group] for part, trees in variables.items()}, x)


@functools.partial(jax.jit, static_argnums=0)
def _applied(net, variables, x):
    return net.apply(variables, x)[0]


def test_what_a_gate_mixes():
    """By hand; the weights add up to 1, equal experts are themselves, and a sure gate is its expert."""
    numbers = np.random.default_rng(0)
    experts, gate = numbers.normal(size=(5, 3, 4)).astype(np.float32), numbers.normal(size=(5, 3)).astype(np.float32)
    weights = np.exp(gate) / np.exp(gate).sum(1, keepdims=True)
    np.testing.assert_allclose(mixture.mix(experts, gate), np.einsum("bm,bmk->bk", weights, experts), rtol=1e-5,
                               atol=1e-6)
    np.testing.assert_allclose(mixture.mix(np.repeat(experts[:, :1], 3, 1), gate), experts[:, 0], rtol=1e-5, atol=1e-6)
    for i in range(3):
        sure = np.broadcast_to(np.float32(50) * np.eye(3, dtype=np.float32)[i], gate.shape)
        np.testing.assert_allclose(mixture.mix(experts, sure), experts[:, i], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(3 * mixture.mix(experts, gate, divide_by_n=True), mixture.mix(experts, gate), rtol=1e-6)


def test_probabilities_may_be_averaged():
    numbers = np.random.default_rng(1)
    experts = numbers.normal(size=(5, 3, 4)).astype(np.float32)
    weights = np.full((5, 3), 1 / 3, np.float32)
    p = np.exp(experts) / np.exp(experts).sum(-1, keepdims=True)
    np.testing.assert_allclose(gating.combined(experts, weights, "probabilities"), p.mean(1), rtol=1e-5)
    np.testing.assert_allclose(gating.combined(experts, weights, "log_probabilities"), np.log(p.mean(1)), rtol=1e-4,
                               atol=1e-6)


def test_weights_that_count():
    """Those of the best add up to 1; straight through, the gradient is that of all."""
    scores = jnp.array([[1., 3., 2.], [0., -1., 0.5]])
    np.testing.assert_allclose(gating.taken(scores, 1), [[0, 1, 0], [0, 0, 1]])
    best = np.exp(2) / (np.exp(2) + np.exp(3))
    np.testing.assert_allclose(gating.taken(scores, 2, True)[0], [0, 1 - best, best], rtol=1e-6)
    np.testing.assert_allclose(gating.taken(scores, 0), jax.nn.softmax(scores))
    values = jnp.array([[5., -1., 2.]])
    slopes = [jax.grad(lambda s, more=more: jnp.sum(values * gating.taken(s, *more)))(scores) for more in (
        (0,), (1, True), (1,))]
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-6)
    assert np.any(slopes[0]) and not np.any(slopes[2]), "a single expert's weight is 1, whatever the gate says"


def test_a_gate_may_be_a_linear_layer():
    """Of so many weights as there are pixels for each expert, and as many multiply-accumulates."""
    model = models.make(_config("model.gate=linear", "model.serve=top-1").model, SHAPE, CLASSES)
    [spec] = model.gate.layers
    assert (spec.path, spec.kernel, spec.macs) == ("backbone/linear", (64, MEMBERS), 64 * MEMBERS)
    assert model.costs()["router"] == 64 * MEMBERS and model.views == ("through", "constant", "others")
    with pytest.raises(UserError, match="gate_width .*no effect"):
        configs.check(_config("model.gate=linear", "model.gate_width=2"))


def test_a_mixture_is_its_gate_and_its_experts():
    model, variables = _model()
    logits, aux = _outputs(model, variables)
    alone = np.stack([_logits_of(net, variables, group, _images())
                      for net, group in zip(model.experts, model.members)], 1)
    scores = _logits_of(model.gate, variables, "gate", _images())
    np.testing.assert_allclose(aux["member_logits"], alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux["gate_logits"], scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, mixture.mix(alone, scores), rtol=1e-4, atol=1e-5)
    assert len(set(np.argmax(scores, 1).tolist())) > 1, "the gate tells images apart"
    assert model.groups == ("gate", "expert0", "expert1", "expert2") and not np.allclose(alone[:, 0], alone[:, 1])


@pytest.mark.parametrize("count, kind, fields", [
    (1, "blocks", ()), (2, "blocks", ("model.combine=log_probabilities",)), (MEMBERS, "blocks", ()),
    (2, "all", ("model.divide_by_n=true",))])
def test_the_best_of_the_gate_are_served(count, kind, fields):
    """The others left out, the weights made to add up to 1; all of them are the whole mixture."""
    model, variables = _model(f"model.serve=top-{count}", *fields)
    model = dataclasses.replace(model, dispatch=Dispatch(kind))
    logits, aux = _outputs(model, variables)
    order = np.argsort(-np.asarray(aux["gate_logits"]), 1, kind="stable")[:, :count]
    chosen, scores = (np.take_along_axis(np.asarray(leaf), where, 1) for leaf, where in (
        (aux["member_logits"], order[..., None]), (aux["gate_logits"], order)))
    weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    expected = gating.combined(chosen, weights, model.combine) / (MEMBERS if model.divide_by_n else 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    if not fields:
        whole, _ = _outputs(*_model())
        assert np.allclose(logits, whole, rtol=1e-4, atol=1e-5) == (count == MEMBERS)


def test_experts_that_differ_in_width_are_served_one_by_one():
    model, variables = _model("model.widths=4, 8, 4", "model.serve=top-1", "model.gate_width=2")
    kernels = [variables["params"][group]["backbone"]["conv1"]["kernel"] for group in model.groups]
    assert [kernel.shape[-1] for kernel in kernels] == [2, 4, 8, 4]
    logits, aux = _outputs(model, variables)
    lead = np.argmax(aux["gate_logits"], 1)
    np.testing.assert_allclose(logits, np.asarray(aux["member_logits"])[np.arange(BATCH), lead], rtol=1e-4, atol=1e-5)
    alone = _logits_of(model.experts[1], variables, "expert1", _images())
    np.testing.assert_allclose(aux["member_logits"][:, 1], alone, rtol=1e-4, atol=1e-5)


def test_serving_the_best_computes_no_other():
    """The compiled program that gives logits alone has no loop over the experts."""
    def loops(*fields):
        model, variables = _model(*fields)
        program = jax.jit(lambda variables, x: model.outputs_fn(variables)(x)[0])
        return f'"known_trip_count":{{"n":"{MEMBERS}"}}' in program.lower(variables, _images()).compile().as_text()

    assert loops() and not loops("model.serve=top-1")


@pytest.mark.slow
def test_views_are_gradients_of_the_same_values():
    """With the gate held constant its part is missing; what was not computed has a gradient in the last view."""
    (model, variables), (whole, _) = _model("model.serve=top-2"), _model()
    cotangent = jax.random.normal(jax.random.key(2), (BATCH, CLASSES))
    held = whole._scores(variables, _images())
    values = {view: model.outputs_fn(variables, view) for view in model.views} | {
        "whole": whole.outputs_fn(variables), "whole, constant": whole.outputs_fn(variables, "constant"),
        "by hand": lambda x: (mixture.mix(whole.outputs_fn(variables)(x)[1]["member_logits"], held),)}

    @jax.jit
    def slopes(x):
        return {name: jax.grad(lambda x, of=of: jnp.vdot(cotangent, of(x)[0]))(x) for name, of in values.items()}

    found = jax.device_get(slopes(_images()))
    assert model.views == ("through", "constant", "others")
    assert not np.allclose(found["through"], found["constant"], rtol=1e-3)
    for ours, theirs in (("others", "whole"), ("whole, constant", "by hand")):
        size = np.abs(found[theirs]).max()
        np.testing.assert_allclose(found[ours], found[theirs], rtol=1e-3, atol=1e-5 * size)


def test_the_gradient_of_a_mixture_is_that_of_differences():
    model, variables = _model()
    direction = jax.random.normal(jax.random.key(3), _images().shape)

    @jax.jit
    def value(x):
        return jnp.sum(model.outputs_fn(variables)(x)[0][:, 0])

    step = 1e-3
    by_hand = (value(_images() + step * direction) - value(_images() - step * direction)) / (2 * step)
    assert float(jnp.vdot(jax.grad(value)(_images()), direction)) == pytest.approx(float(by_hand), rel=2e-2)


def test_a_loss_pass_leaves_the_experts_statistics():
    """The gate's follow the batch; with expert_norm=training those of the experts do too, as released."""
    x = jax.random.uniform(jax.random.key(4), (BATCH, 2, *SHAPE))
    for fields, drifts in (((), False), (("model.expert_norm=training",), True)):
        model, variables = _model(*fields)
        logits, aux, stats = jax.jit(model.train_pass)(variables, x)
        assert logits.shape == (BATCH, 2, CLASSES) and aux["member_logits"].shape == (BATCH, 2, MEMBERS, CLASSES)
        same = {group: all(np.array_equal(a, b) for a, b in zip(
            jax.tree.leaves(stats[group]), jax.tree.leaves(variables["batch_stats"][group]))) for group in model.groups}
        assert same == {"gate": False} | dict.fromkeys(model.members, not drifts)
        alone = _logits_of(model.experts[0], variables, "expert0", x[:, 1])
        assert np.allclose(aux["member_logits"][:, 1, 0], alone, rtol=1e-4, atol=1e-5) != drifts
        np.testing.assert_allclose(logits[:, 1], mixture.mix(aux["member_logits"][:, 1], aux["gate_logits"][:, 1]),
                                   rtol=1e-4, atol=1e-5)


def test_a_uniform_gate_is_no_network():
    model, variables = _model("model.gate=uniform")
    logits, aux = _outputs(model, variables)
    assert model.groups == model.members and model.kind.endswith("the same weight for each")
    np.testing.assert_allclose(logits, aux["member_logits"].mean(1), rtol=1e-5, atol=1e-6)
    assert model.costs()["router"] == 0 and model.views == ("through",)


def test_costs_are_of_what_is_computed():
    """The k best of the gate as they were measured, pruned weights left out."""
    whole, best = _model()[0], _model("model.serve=top-1")[0]
    expert, gate = whole.experts[0].costs(), whole.gate.costs()
    assert whole.costs() | {} == {"pathway": 3 * expert["total"], "router": gate["total"],
                                  "total": 3 * expert["total"] + gate["total"], "params": whole.costs()["params"],
                                  "executed": 3 * expert["executed"] + gate["executed"]}
    assert best.costs()["pathway"] == expert["total"] and best.costs()["executed"] == expert["total"] + gate["total"]
    mask = np.zeros((3, 3, 1, 1), bool)
    masks = {"expert1": {"backbone": {"layer1_0": {"conv1": {"kernel": mask}}}}}
    [spec] = [spec for spec in expert_layers() if spec.path == "backbone/layer1_0/conv1"]
    assert best.costs(masks, {"taken": [0, 1, 0]})["pathway"] == expert["total"] - spec.macs
    assert best.costs(masks, {"taken": [1, 0, 0]})["pathway"] == expert["total"]


def expert_layers():
    return _model()[0].experts[0].layers


def test_facts_of_the_gate():
    y = np.array([1, 2, 0])
    weights = np.array([[.5, .3, .2], [.1, .2, .7], [.6, .4, 0]])
    moved = np.array([[.2, .7, .1], [.1, .2, .7], [1, 0, 0]])
    said = np.array([[1, 0, 1], [0, 0, 2], [3, 3, 0]])
    facts = _model()[0].facts(y, {"gate_weights": weights, "member_predictions": said},
                              {"gate_weights": moved, "member_predictions": np.zeros((3, 3), int)},
                              np.array([True, True, False]))
    assert facts["leads_clean"] == pytest.approx([2 / 3, 0, 1 / 3]) and facts["leads_attacked"] == [0, .5, .5]
    assert facts["weights_clean"] == pytest.approx([.4, .3, .3]) and facts["lead_changes"] == .5
    assert facts["member_sa"] == pytest.approx([1 / 3, 0, 1]) and facts["taken"] == [1, 1, 1]
    assert facts["member_ra"] == pytest.approx([0, 0, 1 / 3])


def test_the_gate_of_the_paper():
    """Trained leaves in stage 3 at the size of the paper: mol.md 8.11."""
    for count, expected in ((4, 11_191_404), (7, 11_208_333)):
        cfg = configs.default(model="mixture").model
        cfg.update(dict(num_experts=1, model_scale=1.0, num_members=count))
        model = models.make(cfg, (32, 32, 3), 10)
        last = model.experts[0].layers[-1].kernel
        assert last == (512, 10) and tree.size(model.gate.shapes["params"]) + count * (513 * 10) == expected


@pytest.mark.parametrize("texts, says", [
    (["model.serve=top-4"], "expected at most top-3"), (["model.serve=best"], "expected all, or top-1"),
    (["model.widths=4,8"], "expected 3 (model.num_members)"), (["model.widths=4,x,8"], "expected a width"),
    (["model.num_members=1"], "model.num_members is 1"), (["model.num_experts=2"], "model.num_experts is 2"),
    (["model.divide_by_n=true", "model.combine=probabilities"], "which can be divided"),
    (["model.gate=uniform", "model.serve=top-1"], "no effect"), (["model.gate=trainde"], "did you mean 'trained'")])
def test_bad_input_is_said_in_a_line(texts, says):
    with pytest.raises(UserError) as error:
        configs.check(_config(*texts))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_run_for_each_expert():
    model, variables = _model()
    parts = [variables["params"][group] for group in model.members]
    found = model.gather(parts)
    assert found["gate"] is None and found["expert1"] == parts[1]
    assert model.gather([variables["params"]]) == variables["params"]
    with pytest.raises(UserError, match="init_from names 2 runs: expected 3 .*, or one mixture"):
        model.gather(parts[:2])
    assert isinstance(model.experts[0], network.Network)
