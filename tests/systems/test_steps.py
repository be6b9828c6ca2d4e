"""What every system promises of its steps, and what is special to AdvMoE and to the standard trainings.

The networks have one block of width 8 on images of 8x8. Systems are built and compiled once a configuration, and
some train by Madry's loss because it compiles sooner.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import slow_but
from jax.sharding import AxisType, Mesh

from advmoe_jax.core import config as configs
from advmoe_jax.core import find, rng, tree
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Arrays
from advmoe_jax.models import model as models
from advmoe_jax.models.router import ROUTINGS
from advmoe_jax.ops import losses, routing
from advmoe_jax.pruning import magnitude, pruned
from advmoe_jax.systems import adversarial, adversary, methods
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import loop
from advmoe_jax.train import state as states
from advmoe_jax.train import step as train_step
from advmoe_jax.train.system import Inputs

pytestmark = pytest.mark.usefixtures("tiny_resnet")
COUNT, SHAPE, CLASSES, BATCH = 64, (8, 8, 1), 4, 32
ADVMOE, DENSE = ("advmoe",), ("standard", "model.num_experts=1")
VIT = ("advmoe", "model.name=vit", "model.heads=2", "model.patch=4", "model.depth=2", "model.moe_every=1",
       "system.loss=madry")
_PRUNES = ("model.num_experts=1", "system.loss=madry", "system.rate=1/2", "init_from=base")
_GATED = ("model.name=mixture", "model.num_experts=1", "model.num_members=2", "model.gate=linear", "model.serve=top-1",
          "model.expert_norm=training")
CASES = {
    "admm": [("admm", *_PRUNES)],
    "advmoe": [ADVMOE, VIT, *(
        ("advmoe", f"model.routing={name}", "system.loss=madry") for name in ROUTINGS if name != "layer")],
    "eat": [("eat", "model.num_experts=1", "train.attack=rotation pgd(num_steps=1)")],
    "mask_search": [("mask_search", *_PRUNES)],
    "flying_bird": [("flying_bird", "model.num_experts=1", "system.loss=madry", "system.rate=1/2")],
    "rst": [("rst", "model.num_experts=1", "system.loss=madry", "system.rate=1/2")],
    "mol": [("mol", "model.name=mixture", "model.num_experts=1", "model.num_members=2", "init_from=base")],
    "rt_er": [("rt_er", *_GATED), ("rt_er", *_GATED, "model.name=dual", "system.experts=every")],
    "ramp": [("ramp", "model.num_experts=1", "train.attack=rotation pgd(num_steps=1)", "train.several=mean")],
    "standard": [DENSE, ("standard", "system.loss=madry")],
    "prune": [("prune", *_PRUNES, "system.groups=4")],
    "twin_rep": [("twin_rep", "model.num_experts=1", "system.loss=madry", "system.rate=1/2")],
    "eed": [("eed", "model.name=team", "model.num_experts=1", "model.num_members=2", "system.host=none",
             "system.loss=madry", "system.team_rate=1/10", "system.member_rate=11/20", "init_from=base")]}
_SLOW = {"rt_er", "rst", "flying_bird", "twin_rep", "eed", "ramp", "eat"}
_SEARCHES = ("mask_search", "rst")
OWN_METRICS = {"admm": {"distance"}, "mol": {"gate", "gate_entropy"}, "rt_er": {"gate", "gate_entropy", "expert_kl"},
               "eed": {"wrong", "compact", "disagreement", "active"}}
each_system = pytest.mark.parametrize("case", slow_but(
    lambda case: case[0][0] not in _SLOW and ("system.loss=madry" not in case[0] or "init_from=base" in case[0]),
    [(case,) for cases in CASES.values() for case in cases]), ids="-".join)


def _config(name, *overrides):
    config = configs.default()
    for text in (f"system.name={name}", *filter(lambda text: text.startswith("model.name="), overrides),
                 "model.depth=4", "model.width=8", "model.router_width=4", "data.pad=1",
                 "train.attack=pgd(num_steps=1,step_size=0.625 eps,keep=last)", f"data.batch_size={BATCH}",
                 "train.length=40 steps", *overrides):
        configs.override(config, text)
    return config


@functools.cache
def _system(case, devices=4):
    config = _config(*case)
    mesh = Mesh(np.array(jax.devices()[:devices]), (meshes.AXIS,), axis_types=(AxisType.Auto,))
    net = models.make(config.model, SHAPE, CLASSES)
    data = pipeline.Data(_split(), np.arange(COUNT), _split(), np.arange(4), _split(), CLASSES, SHAPE)
    make = find.module("systems", config.system.name, defines="make").make
    single = getattr(net, "member", net)
    variables = jax.device_get(jax.jit(single.init)(jax.random.key(3)))
    sources = {config.init_from: Source(None, config, single, variables, {}, 0)} if config.init_from else {}
    if single is not net:
        left = pruned.choose(pruned.of(None, variables, single.layers, "11/20", "every"), "magnitude",
                             magnitude.Config())
        sources |= {name: Source(None, config, single, jax.device_get(left.variables), left.masks, 0) for name in "ab"}
    return make(config, net, data, mesh, sources), mesh


@functools.cache
def _fresh(case):
    """The state before the first step, as numpy."""
    return jax.device_get(_system(case)[0].init(rng.key(0, "init")))


@functools.cache
def _split():
    """Four classes of images: flat, striped down or across, checked; with noise."""
    label = np.arange(COUNT, dtype=np.int32) % CLASSES
    rows, cols = np.mgrid[:8, :8][..., None] % 2
    patterns = np.stack([0 * rows, rows, cols, (rows + cols) % 2])
    noise = np.random.default_rng(0).integers(0, 80, (COUNT, *SHAPE))
    return Arrays((170 * patterns[label] + noise).astype(np.uint8), label)


def _put(state, mesh):
    return jax.device_put(jax.tree.map(np.array, state), meshes.replicated(mesh))


def _batch(mesh, rows=np.arange(BATCH)):
    return pipeline.device_batch(mesh, _split(), rows)


def _stepped(step, state, batch):
    return step.update(state, step.prepare(state, batch, step.inputs))


def _run(case, step, state, devices=4):
    """One step of a system from a state in numpy, back to numpy."""
    mesh = _system(case, devices)[1]
    return jax.device_get(_stepped(step, _put(state, mesh), _batch(mesh)))


@functools.cache
def _after_one(case, devices=4):
    """{name of the step: (state, metrics)}, each from the fresh state."""
    return {step.name: _run(case, step, _fresh(case), devices) for step in _system(case, devices)[0].steps}


def _bytes(part):
    return {name: leaf.tobytes() for name, leaf in tree.named_leaves(part).items()}


def test_every_system_is_tested():
    assert set(CASES) == set(find.names("systems", "make"))


def _trained(case, state, group):
    """What is trained of a group: its parameters; in a search its scores, since weights rest there; of an expert of a
    mixture its last layer."""
    if case[0] == "mol" and group != "gate":
        return state.params[group]["backbone"]["linear"]
    return state.extra["search"]["scores"][group] if case[0] in _SEARCHES else state.params[group]


@each_system
def test_a_step_changes_what_it_owns_and_nothing_else(case):
    system, _ = _system(case)
    before = _fresh(case)
    steps = system.steps
    for step in steps:
        after, _ = _after_one(case)[step.name]
        assert set(step.owns) <= set(before.params) and step.owns
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for group in before.params:
            for part in ("params", "batch_stats", "opt"):
                old, new = (_bytes(_trained(case, state, group) if part == "params" else getattr(state, part)[group])
                            for state in (before, after))
                if group not in step.owns or (case[0] == "mol" and group != "gate" and part == "batch_stats"):
                    assert old == new, f"{step.name} changed {part} of {group}"
                elif part == "opt":
                    assert old != new
                else:
                    same = [name for name in old if old[name] == new[name]]
                    assert not same, f"{step.name} left {part} of {group} as they were: {same}"
        assert int(after.step) == 0, "the loop counts"
        if case[0] in _SEARCHES:
            assert _bytes(after.extra["search"]["dense"]) == _bytes(before.extra["search"]["dense"])
    assert {group for step in steps for group in step.owns} == set(before.params)


@each_system
def test_metrics_are_finite(case):
    system, _ = _system(case)
    for step in system.steps:
        metrics = _after_one(case)[step.name][1]
        assert metrics["non_finite"] == -1 and all(np.all(np.isfinite(v)) for v in metrics.values())
        assert metrics["loss"] > 0 and all(metrics[f"grad_norm_{group}"] > 0 for group in step.owns)
        rates = {"ra"} if "system.loss=madry" in case or case[0] in ("mol", "eat") else {"sa", "ra"}
        if getattr(system.model, "num_experts", 1) > 1:
            np.testing.assert_allclose(metrics["load"].sum(-1), 1, rtol=1e-5)
            assert metrics["load"].shape == (len(metrics["load_entropy"]), 2)
            assert len(metrics["load"]) == (1 if "model.routing=global" in case else 2)
            rates |= {"load", "load_entropy"} | ({"flip_rate"} if "sa" in rates else set())
        own = OWN_METRICS.get(case[0], set())
        if "model.name=dual" in case and step.name == "upper":  # which sees clean images alone
            rates, own = rates - {"ra"}, own - {"expert_kl"}
        assert metrics.keys() == rates | own | {"loss", "non_finite"} | {f"grad_norm_{group}" for group in step.owns}
        assert all(np.all((metrics[name] >= 0) & (metrics[name] <= 1 + 1e-6)) for name in rates)


@pytest.mark.parametrize("case", [ADVMOE, DENSE], ids="-".join)
def test_a_step_is_a_function_of_state_and_batch(case):
    """The random numbers of a step come from the step's number in the state."""
    [step, *_] = _system(case)[0].steps
    before = _fresh(case)
    expected, metrics = _after_one(case)[step.name]
    again, same_metrics = _run(case, step, before)
    assert _bytes(again) == _bytes(expected) and _bytes(same_metrics) == _bytes(metrics)
    later, _ = _run(case, step, before.replace(step=np.int32(1)))
    group = step.owns[0]
    assert _bytes(later.params[group]) != _bytes(expected.params[group])


@pytest.mark.parametrize("case", [ADVMOE, DENSE], ids="-".join)
def test_state_is_donated(case):
    system, mesh = _system(case)
    for step in system.steps:
        state = _put(_fresh(case), mesh)
        _stepped(step, state, _batch(mesh))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("case", [ADVMOE, DENSE], ids="-".join)
def test_one_device_and_four_agree(case):
    """Losses, gradients (the first momentum), and what changes in parameters and running statistics."""
    one, four = (_after_one(case, devices) for devices in (1, 4))
    for name in four:
        for metric in ("loss", "sa", "ra", *(m for m in four[name][1] if m.startswith("grad_norm"))):
            ours, theirs = (found[name][1][metric] for found in (one, four))
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=f"{name} {metric}")
        before = _fresh(case)
        for group in before.params:
            for part in ("params", "batch_stats", "opt"):
                old, ours, theirs = (tree.named_leaves(getattr(state, part)[group])
                                     for state in (before, one[name][0], four[name][0]))
                change = {leaf: np.asarray(theirs[leaf], np.float64) - old[leaf] for leaf in old}
                largest = max(np.abs(values).max() for values in change.values())
                for leaf in old:
                    np.testing.assert_allclose(ours[leaf] - np.asarray(old[leaf], np.float64), change[leaf], rtol=0,
                                               atol=1e-5 * largest + 2e-7 * np.abs(old[leaf]).max(),
                                               err_msg=f"{name} {part} {group} {leaf}")


@pytest.mark.parametrize("case", [ADVMOE, DENSE], ids="-".join)
def test_loss_decreases(case):
    system, mesh = _system(case)
    state = system.init(rng.key(0, "init"))
    seen = {step.name: [] for step in system.steps}
    for i in range(30):
        state, metrics = loop.iterate(system, state, i, 2, lambda stream, i=i: _batch(
            mesh, pipeline.batch_indices(system.rows, BATCH, 0, stream, i)))
        for name in seen:
            seen[name].append((float(metrics[f"{name}/loss"]), float(metrics[f"{name}/sa"])))
    assert int(state.step) == 30
    values = np.array(seen[system.steps[-1].name])
    assert values[-4:, 0].mean() < 0.8 * values[:4, 0].mean()
    assert values[-4:, 1].mean() > values[:4, 1].mean() + 0.2


# Losses and options, on the objective alone.


def _objective(*overrides, router_loss=False):
    """The network and a jitted labels -> (loss, (batch_stats, metrics)) of its first parameters and clean images that
    stand for the adversarial ones too, unless others are given."""
    config = _config(*overrides)
    net = models.make(config.model, SHAPE, CLASSES)
    variables = jax.jit(net.init)(jax.random.key(0))
    run = adversarial.objective(net, config, router_loss=router_loss)
    x = jnp.asarray(_split().images[:BATCH], jnp.float32) / 255

    @jax.jit
    def of(labels, params=variables["params"], **more):
        state = states.fresh(variables | {"params": params}, {})
        return run(state, {"image": x, "adversarial": x[:, None], "label": labels, **more})

    return net, variables, x, of


LABELS = np.arange(BATCH, dtype=np.int32) % CLASSES


@pytest.mark.parametrize("loss, passes", [
    ("natural", {"sa"}), ("madry", {"ra"}), ("mart", {"sa", "ra"})])  # trades is above
def test_losses_of_the_standard_system(loss, passes):
    _, variables, _, of = _objective("standard", "model.num_experts=1", f"system.loss={loss}")

    @jax.jit
    def both(params):
        return jax.value_and_grad(lambda p: of(LABELS, p), has_aux=True)(params)

    (value, (_, metrics)), grads = both(variables["params"])
    assert np.isfinite(value) and value > 0 and metrics.keys() == passes
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(grads))
    if loss == "natural":
        assert value == pytest.approx(np.log(CLASSES), rel=0.2)


def test_natural_loss_is_the_cross_entropy_in_train_mode():
    net, variables, x, of = _objective("standard", "model.num_experts=1", "system.loss=natural")
    logits, _, stats = jax.jit(net.apply_train)(variables, x)
    value, (committed, *_) = of(LABELS)
    assert value == pytest.approx(float(jnp.mean(losses.cross_entropy(logits, LABELS))), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(committed), jax.tree.leaves(stats)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_adversarial_loss_reads_the_adversarial_images():
    net, variables, x, of = _objective("standard", "model.num_experts=1", "system.loss=madry")
    other = x[::-1]
    logits, *_ = jax.jit(net.apply_train)(variables, other)
    value, _ = of(LABELS, adversarial=other[:, None])
    assert value == pytest.approx(float(jnp.mean(losses.cross_entropy(logits, LABELS))), rel=1e-5)


def test_label_mod_reads_the_label_modulo_the_experts():
    *_, of = _objective("advmoe", "system.router_loss=label_mod", router_loss=True)
    values = [float(of((LABELS + shift) % CLASSES)[0]) for shift in (0, 1, 2)]
    assert values[0] == values[2] != values[1] and np.all(np.isfinite(values))


def test_balance_loss_is_added():
    net, variables, x, of = _objective("standard", "system.loss=natural", "system.balance_loss=0.5")
    logits, aux, _ = jax.jit(net.apply_train)(variables, x)
    balance = float(routing.balance_loss(aux["router_logits"]))
    assert 0 < balance <= 2
    natural = float(jnp.mean(losses.cross_entropy(logits, LABELS)))
    assert float(of(LABELS)[0]) == pytest.approx(natural + 0.5 * balance, rel=1e-5)


# What an iteration is made of.


def _steps(*case):
    return _system(case)[0].steps


def test_order_and_streams_of_advmoe():
    lower, upper = _steps("advmoe")
    assert (lower.name, lower.owns, upper.name, upper.owns) == ("lower", ("router",), "upper", ("backbone",))
    assert [step.name for step in _steps("advmoe", "system.order=backbone_first")] == ["upper", "lower"]
    assert (lower.inputs, upper.inputs) == (
        Inputs("data/lower", "lower", "lower"), Inputs("data/upper", "upper", "upper"))


@pytest.mark.parametrize("order, first", [("router_first", "lower"), ("backbone_first", "upper")])
def test_what_levels_share(order, first):
    """A batch with its crops, each attacked with noise of its own; or the adversary too."""
    shared = _steps("advmoe", f"system.order={order}", "system.share_batch=true")
    assert {step.name: step.inputs for step in shared} == {
        name: Inputs("data/lower", first, name) for name in ("lower", "upper")}
    both = _steps("advmoe", f"system.order={order}", "system.share_batch=true", "system.share_attack=true")
    assert both[0].inputs == both[1].inputs == Inputs("data/lower", first, first)


@pytest.mark.parametrize("order", ["router_first", "backbone_first"])
def test_the_router_may_be_updated_now_and_then(order):
    steps = _steps("advmoe", "system.router_every=3", f"system.order={order}")
    assert {step.name: step.every for step in steps} == {"lower": 3, "upper": 1}


def test_crops_and_noise_come_from_the_inputs():
    """Whatever the step is, and whatever stream its batch came from."""
    (lower, upper), mesh = _steps("advmoe"), _system(("advmoe",))[1]
    state = _put(_fresh(ADVMOE), mesh)
    one, same, noise, crops = (jax.device_get(step.prepare(state, _batch(mesh), inputs)) for step, inputs in (
        (lower, Inputs("data", "a", "a")), (upper, Inputs("other", "a", "a")), (lower, Inputs("data", "a", "b")),
        (lower, Inputs("data", "b", "a"))))
    assert one.keys() == {"image", "adversarial", "label", "index"}
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
    np.testing.assert_array_equal(noise["image"], one["image"])
    assert np.any(noise["adversarial"] != one["adversarial"]) and np.any(crops["image"] != one["image"])


def test_natural_training_makes_no_adversarial_images():
    case = ("standard", "model.num_experts=1", "system.loss=natural")
    [step], mesh = _steps(*case), _system(case)[1]
    found = step.prepare(_put(_fresh(DENSE), mesh), _batch(mesh), step.inputs)
    assert found.keys() == {"image", "label", "index"}


def test_an_attack_is_given_the_iteration_and_the_rows_of_its_images(monkeypatch):
    """By the one attacks take turns; by the other an image's noise does not depend on who shares its batch."""
    given = {}

    def attack(variables, key, x, y, index, step):
        jax.debug.callback(lambda index, step: given.update(index=np.asarray(index), step=int(step)), index, step)
        return x[:, None]

    monkeypatch.setattr(adversary, "training_attack", lambda *_: attack)
    system, mesh = _system.__wrapped__(DENSE, devices=1)
    [step], rows = system.steps, np.arange(BATCH)[::-1] + 7
    step.prepare(_put(_fresh(DENSE).replace(step=np.int32(5)), mesh), _batch(mesh, rows), step.inputs)
    jax.effects_barrier()
    assert given["step"] == 5 and given["index"].tolist() == rows.tolist()


def test_levels_share_the_program_that_attacks(monkeypatch):
    """It is traced once; each level has noise of its own."""
    traced, drawn = [], []

    def attack(variables, key, x, y, index, step):
        traced.append(x.shape)
        jax.debug.callback(lambda noise: drawn.append(float(noise)), jax.random.uniform(key))
        return x[:, None]

    monkeypatch.setattr(adversary, "training_attack", lambda *_: attack)
    system, mesh = _system.__wrapped__(("advmoe", "system.loss=madry"), devices=1)
    state, batch = _put(_fresh(ADVMOE), mesh), _batch(mesh)
    for step in system.steps:
        state, _ = _stepped(step, state, batch)
    jax.effects_barrier()
    assert traced == [(BATCH, *SHAPE)] and len(drawn) == len(set(drawn)) == 2


def test_a_shared_attack_is_made_once():
    """The level that comes second trains on the images that were made before the first one's update."""
    system, mesh = _system((*ADVMOE, "system.loss=madry", "system.share_batch=true", "system.share_attack=true"), 1)
    lower, upper = system.steps
    made = lower.prepare(_put(_fresh(ADVMOE), mesh), _batch(mesh), lower.inputs)
    change = np.abs(made["adversarial"][:, 0] - made["image"])
    assert made["adversarial"].shape == (BATCH, 1, *SHAPE) and 0.9 * 8 / 255 < change.max() <= 8 / 255 + 1e-6
    assert made["adversarial"].min() >= 0 and made["adversarial"].max() <= 1
    fed = []
    spied = dataclasses.replace(system, steps=tuple(dataclasses.replace(
        step, update=lambda state, batch, step=step: fed.append(batch) or step.update(state, batch))
        for step in system.steps))
    loop.iterate(spied, _put(_fresh(ADVMOE), mesh), 0, 2, lambda stream: _batch(mesh))
    assert fed[0] is fed[1]
    np.testing.assert_array_equal(fed[1]["adversarial"], made["adversarial"])
    state = jax.device_get(lower.update(_put(_fresh(ADVMOE), mesh), made)[0])
    _, attacked = upper.update(_put(state, mesh), made)
    _, clean = upper.update(_put(state, mesh), made | {"adversarial": made["image"][:, None]})
    assert attacked["loss"] > clean["loss"] and attacked["ra"] <= clean["ra"]


def test_the_batch_of_a_step_is_a_function_of_seed_stream_and_step():
    lower, upper = _steps("advmoe")

    def rows(seed, stream, step):
        return tuple(pipeline.batch_indices(np.arange(COUNT), BATCH, seed, stream, step))

    batches = {(seed, stream, step): rows(seed, stream, step)
               for seed in (0, 1) for stream in (lower.inputs.batch, upper.inputs.batch) for step in (0, 1, 2)}
    assert len(set(batches.values())) == len(batches)
    assert all(rows(*args) == found for args, found in batches.items())


def test_names_of_the_system():
    assert _system(("advmoe", "system.router_loss=label_mod"))[0].describe != _system(("advmoe",))[0].describe
    kinds = [_system(("standard", *more))[0].describe for more in (
        (), ("model.num_experts=1",), ("model.num_experts=1", "model.model_scale=1"), ("system.loss=natural",))]
    assert kinds == ["AT(MoE) by trades", "AT(S-Dense) by trades", "AT(Dense) by trades", "natural MoE"]


@pytest.mark.parametrize("method, system, loss, kind", [
    ("advmoe", "advmoe", "trades", "MoE"), ("at_moe", "standard", "trades", "MoE"),
    ("at_sdense", "standard", "trades", "S-Dense"), ("at_dense", "standard", "trades", "Dense"),
    ("natural", "standard", "natural", "Dense")])
def test_methods_by_name(method, system, loss, kind):
    """Each is what its name says, whatever the config was before, and makes a config that is accepted."""
    for before in ("advmoe", "at_dense", "natural"):
        config = configs.default(data="digits")
        methods.choose(config, before)
        methods.choose(config, method)
        assert (config.system.name, config.system.loss) == (system, loss)
        assert models.make(config.model, SHAPE, CLASSES).kind == kind
        configs.check(config)


def test_a_method_that_is_none_is_refused():
    assert set(methods.METHODS) == {"advmoe", "at_moe", "at_sdense", "at_dense", "natural"}
    with pytest.raises(UserError, match="did you mean 'at_dense'") as caught:
        methods.choose(configs.default(), "at_dens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("trains, other", [
    ("router", "backbone"), pytest.param("backbone", "router", marks=pytest.mark.slow)])
def test_one_part_alone_is_trained(trains, other):
    """The other rests with its running statistics, and has no optimizer."""
    case = ("standard", "system.loss=madry", f"system.trains={trains}")
    before, (after, metrics) = _fresh(case), _after_one(case)["train"]
    assert list(before.opt) == [trains] and set(before.params) == {trains, other}
    assert _bytes(after.params[other]) == _bytes(before.params[other])
    assert _bytes(after.batch_stats[other]) == _bytes(before.batch_stats[other])
    assert _bytes(after.params[trains]) != _bytes(before.params[trains])
    assert metrics[f"grad_norm_{trains}"] > 0 and f"grad_norm_{other}" not in metrics
    assert _system(case)[0].describe.endswith(f", {trains} alone")


def test_views_are_those_of_an_honest_evaluation():
    assert _system(ADVMOE)[0].model.views == ("none", "ste_selected", "ste_full")
    assert _system(DENSE)[0].model.views == ("none",)


@pytest.mark.parametrize("case, words", [
    (("advmoe", "model.num_experts=1"), ["num_experts", "standard"]),
    (("advmoe", "system.loss=natural"), ["natural", "trades"]),
    (("advmoe", "system.order=router_last"), ["router_last", "router_first"]),
    (("advmoe", "system.share_attack=true"), ["system.share_attack", "system.share_batch=true"]),
    (("standard", "system.router_every=2"), ["system.router_every", "system.name=advmoe"]),
    (("advmoe", "system.router_loss=label_mood"), ["label_mod"]),
    (("standard", "system.loss=trade"), ["did you mean 'trades'"]),
    (("standard", "attack.norm=l3"), ["l2"]), (("standard", "attack.router_grad=ste_fool"), ["ste_full"]),
    (("standard", "optim.backbone.schedule=cosin"), ["cosine"]), (("standard", "model.routing=layers"), ["layer"]),
    (("standard", "data.batch_size=128"), ["128", "64"])])
def test_refused_configs(case, words):
    with pytest.raises(UserError) as caught:
        configs.check(_config(*case))
        _system(case)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


# What is not finite is named, on a model of three numbers.


def _toy(loss):
    """A step that descends `loss` of parameters a, b, c, and the state with its NaNs and zeros."""
    optimizer = optax.sgd(0.1)
    params = {"backbone": {"a": jnp.ones(()), "b": jnp.zeros(()), "c": jnp.full((), jnp.nan)}}
    state = states.fresh({"params": params}, {"backbone": optimizer})

    def objective(state, batch):
        return loss(state.params["backbone"]), (state.batch_stats, {})

    mesh = meshes.make()
    prepare = train_step.preparation(None, seed=0, mesh=mesh, data_cfg=types.SimpleNamespace(pad=0, flip=False))
    step = train_step.make("toy", objective, prepare, Inputs("data", "toy", "toy"), owns=("backbone",),
                           optimizers={"backbone": optimizer}, state=state, mesh=mesh)
    return step, state, pipeline.device_batch(mesh, _split(), np.arange(4))


@pytest.mark.parametrize("loss, name", [
    (lambda p: p["a"] / p["b"], "loss"),
    (lambda p: p["a"] + jnp.sqrt(p["b"]), "gradient backbone/b"),
    (lambda p: p["a"] + p["b"], "parameter backbone/c"),
    (lambda p: p["c"], "loss")])
def test_what_is_not_finite_is_named(loss, name):
    step, state, batch = _toy(loss)
    _, metrics = _stepped(step, state, batch)
    assert step.tensors[int(metrics["non_finite"])] == name


@pytest.mark.parametrize("group", ["backbone", "router"])
def test_a_nan_parameter_is_seen_by_the_step_that_owns_it(group):
    """In the router it may leave the loss finite, since a choice is one-hot."""
    before = _fresh(ADVMOE)
    leaves, structure = jax.tree.flatten(before.params[group])
    poisoned = [np.full_like(leaf, np.nan) if i == 0 else leaf for i, leaf in enumerate(leaves)]
    params = {**before.params, group: jax.tree.unflatten(structure, poisoned)}
    [step] = [step for step in _steps("advmoe") if group in step.owns]
    _, metrics = _run(ADVMOE, step, before.replace(params=params))
    assert metrics["non_finite"] >= 0
    name = step.tensors[int(metrics["non_finite"])]
    assert name == "loss" if group == "backbone" else name == "loss" or " router/" in name
