"""A team that stops: its answers by hand, its gradients, and images that leave the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data.split import Arrays
from advmoe_jax.evaluation import measure, suites
from advmoe_jax.models import model as models
from advmoe_jax.models import taps
from advmoe_jax.models.team import Team
from advmoe_jax.ops import losses, stopping

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, BATCH = (8, 8, 1), 4, 40


@functools.cache
def _team(*overrides):
    config = configs.default()
    configs.override_all(config, ["model.name=team", "model.depth=4", "model.width=4", "model.num_experts=1",
                                  "model.model_scale=1", "model.num_members=3", *overrides])
    model = models.make(config.model, SHAPE, CLASSES)
    return model, _variables()


@functools.cache
def _variables():
    """Of members that are sure of some images and not of others."""
    config = configs.default()
    configs.override_all(config, ["model.name=team", "model.depth=4", "model.width=4", "model.num_experts=1",
                                  "model.model_scale=1", "model.num_members=3"])
    team = models.make(config.model, SHAPE, CLASSES)
    params, stats = _parts(team)
    for group in team.groups:
        own = params[group]["backbone"]
        linear = {name: 1500 * leaf for name, leaf in own["linear"].items()}
        member = {"params": {"backbone": own | {"linear": linear}}, "batch_stats": stats[group]}
        mean = jnp.mean(_call(team.member.outputs_fn(member), _x())[0], 0)
        params[group] = {"backbone": own | {"linear": linear | {"bias": -mean}}}
    return {"params": params, "batch_stats": stats}


def _parts(team):
    """Members that have much in common."""
    variables = jax.jit(team.init)(jax.random.key(0))
    params = {group: jax.tree.map(lambda ours, shared: shared + 0.3 * ours, own, variables["params"]["member0"])
              for group, own in variables["params"].items()}
    return params, variables["batch_stats"]


@functools.cache
def _x():
    return jax.random.uniform(jax.random.key(1), (BATCH, *SHAPE))


@jax.jit
def _call(function, x):
    return function(x)


def _one_by_one(team, variables):
    """(B, M, K) probabilities."""
    return jnp.stack([jax.nn.softmax(_call(team.member.outputs_fn(of), _x())[0]) for of in team.members(variables)], 1)


@pytest.mark.parametrize("more", [(), ("model.combiner=max",), ("model.gate=thresholds", "model.least_confidence=0.6"),
                                  ("model.gate=never",)], ids=str)
def test_the_answer_is_that_of_the_rule(more):
    team, variables = _team(*more)
    p = _one_by_one(team, variables)
    logits, aux = _call(team.outputs_fn(variables), _x())
    np.testing.assert_allclose(jax.nn.softmax(aux["member_logits"]), p, atol=1e-5)
    if team.rule is None:
        expected, asked, used = stopping.answers(p, team.combiner)[:, -1], np.full(BATCH, 3), np.full(BATCH, 3)
    else:
        found = stopping.stop(p, team.rule)
        expected, asked, used = found.probabilities, stopping.asked(p, team.rule), found.z
        assert 1 < used.mean() < 3, "the images are not all alike"
    np.testing.assert_allclose(jnp.exp(logits), expected, atol=1e-5)
    np.testing.assert_array_equal(aux["members_asked"], asked)
    np.testing.assert_array_equal(aux["members_used"], used)


def test_views_have_one_value_and_gradients_of_their_own():
    team, variables = _team()
    y = jnp.zeros(BATCH, int)

    def of_answer(answer):
        return lambda x: jnp.sum(losses.cross_entropy(answer(jnp.stack([jax.nn.log_softmax(
            team.member.outputs_fn(of)(x)[0]) for of in team.members(variables)], 1)), y))

    ways = {"average": lambda log_p: jax.nn.logsumexp(log_p, 1), "member1": lambda log_p: log_p[:, 1],
            "soft": lambda log_p: jnp.log(stopping.expected(jnp.exp(log_p), team.rule))}

    @jax.jit
    def both(function, x):
        logits, pull = jax.vjp(lambda x: function(x)[0], x)
        return logits, pull(jax.grad(lambda logits: jnp.sum(losses.cross_entropy(logits, y)))(logits))[0]

    assert team.views == ("none", "soft", "average", "member0", "member1", "member2")
    values, slopes = {}, {}
    for view in team.views:
        values[view], slopes[view] = both(team.outputs_fn(variables, view), _x())
        np.testing.assert_array_equal(values[view], values["none"])
    for view, way in ways.items():
        [answer] = [way]
        log_p = jax.nn.log_softmax(_call(team.outputs_fn(variables), _x())[1]["member_logits"])
        cotangent = jax.nn.softmax(values["none"]) - jax.nn.one_hot(y, CLASSES)
        expected = jax.jit(jax.grad(lambda x, answer=answer: jnp.sum(cotangent * answer(jnp.stack([
            jax.nn.log_softmax(team.member.outputs_fn(of)(x)[0]) for of in team.members(variables)], 1)))))(_x())
        np.testing.assert_allclose(slopes[view], expected, atol=1e-4 * np.abs(expected).max(), err_msg=view)
        assert log_p.shape == (BATCH, 3, CLASSES)
    assert all(not np.allclose(slopes["none"], slopes[view], rtol=0.1) for view in ways), "the stop hides something"


@pytest.mark.parametrize("more", [(), ("model.gate=thresholds", "model.least_confidence=0.6")], ids=str)
def test_images_that_are_done_leave_the_batch(more, monkeypatch):
    team, variables = _team(*more)
    sequential = _team("model.dispatch_members=sequential", *more)[0]
    logits, aux = _call(team.outputs_fn(variables), _x())
    computed = []
    from advmoe_jax.models import team as module
    of_member = module._of_member
    monkeypatch.setattr(module, "_of_member", lambda *args: computed.append(len(args[3])) or of_member(*args))
    found, by = sequential.outputs_fn(variables)(_x())
    np.testing.assert_allclose(found, logits, atol=1e-5)
    for name in ("members_asked", "members_used"):
        np.testing.assert_array_equal(by[name], aux[name])
    left = [int(np.sum(aux["members_asked"] > i)) for i in range(3)]
    assert left[2] < BATCH and computed == [min(-(-count // 5) * 5, BATCH) for count in left if count]
    again = _call(sequential.outputs_fn(variables), _x())
    np.testing.assert_array_equal(again[0], logits)
    assert len(computed) == len([count for count in left if count]), "a traced program computes all members"


def test_images_leave_a_batch_that_several_devices_hold():
    team, variables = _team("model.dispatch_members=sequential")
    mesh = meshes.make()
    x = jax.device_put(_x(), meshes.by_example(mesh))
    assert len(x.devices()) == 4
    found, _ = team.outputs_fn(jax.device_put(variables, meshes.replicated(mesh)))(x)
    np.testing.assert_allclose(found, _call(team.outputs_fn(variables), _x())[0], atol=1e-5)


def test_what_is_asked_is_what_it_costs():
    team, _ = _team()
    facts = {"clean": {"asked": [1.0, 0.5, 0.25]}}
    single, dense = team.member.costs(), team.costs()
    assert dense["total"] == 3 * single["total"] == dense["executed"] and dense["params"] == 3 * single["params"]
    assert team.costs(facts=facts)["total"] == round(1.75 * single["total"])
    assert team.costs(facts=facts)["executed"] == 3 * single["total"]
    sequential = _team("model.dispatch_members=sequential")[0]
    assert sequential.costs(facts=facts)["executed"] == round(1.75 * single["total"])


@pytest.mark.slow
def test_a_team_is_evaluated_through_all_of_its_views():
    team, variables = _team()
    images = np.asarray(255 * _x()).astype(np.uint8)[:12]
    labels = np.asarray(jnp.argmax(_call(team.outputs_fn(variables), images / np.float32(255))[0], -1), np.int32)
    [suite] = suites.alone("fgsm", "linf", "0.1")
    found = measure.run(team, variables, Arrays(images, labels), np.arange(12), suite, mesh=meshes.make(),
                        batch_size=12, seed=0)
    record = measure.summarize(found, suite, team)
    assert tuple(record["ra_by_view"]) == team.views and record["ra"] <= min(record["ra_by_view"].values())
    assert record["sa"] == 1 and record["facts"]["clean"]["asked"][0] == 1
    assert 1 <= record["facts"]["attacked"]["mean_used"] <= record["facts"]["attacked"]["mean_asked"] <= 3
    [exits] = suites.alone("exits(mode=force,num_steps=2)", "linf", "0.1")
    by_members = measure.run(team, variables, Arrays(images, labels), np.arange(12), exits, mesh=meshes.make(),
                             batch_size=12, seed=0)
    assert [attempt.view for attempt in by_members.attempts] == ["none"], "the members' logits have one gradient"
    [none] = suites.alone("fgsm", "linf", "0")
    unharmed = measure.run(team, variables, Arrays(images, labels), np.arange(12), none, mesh=meshes.make(),
                           batch_size=12, seed=0)
    assert unharmed.survivors().all()


def test_training_is_on_the_answer_of_all_members():
    config = configs.default()
    team = _team()[0].in_training(config.train)
    assert team.rule is None and team.views == ("none", "member0", "member1", "member2")
    variables = _variables()
    logits, aux, stats = jax.jit(team.train_pass)(variables, jnp.stack([_x(), _x() / 2], 1))
    np.testing.assert_allclose(jax.nn.softmax(logits), jax.nn.softmax(aux["member_logits"]).mean(2), atol=1e-5)
    one, _, own = jax.jit(team.member.train_pass)(team.members(variables)[1], jnp.stack([_x(), _x() / 2], 1))
    np.testing.assert_allclose(aux["member_logits"][:, :, 1], one, rtol=1e-3, atol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stats["member1"], own)


def test_how_active_layers_are():
    """Of what each layer reads but the first, which reads the image: two convolutions and the linear layer."""
    team, variables = _team()
    member = team.members(variables)[0]
    x = jnp.stack([_x()[:5], _x()[5:10]], 1)
    passes, smooth, share = taps.active(lambda: team.member.train_pass(member, x))
    assert smooth.shape == share.shape == (2, 5) and passes[0].shape == (5, 2, CLASSES)
    assert np.all((0 < smooth) & (smooth < share) & (share <= 1))
    features = taps.features(lambda: team.member.outputs_fn(member)(_x()))
    assert [f.shape for f in features] == [(BATCH, 8, 8, 4)] * 3
    _, first, _ = taps.active(lambda: team.member.outputs_fn(member)(_x()))
    read = np.maximum(np.asarray(features[0]), 0)
    assert first.shape == (1, BATCH) and np.mean(read / (read + 0.1)) == pytest.approx(float(first.mean()), abs=0.4)


def test_members_are_dense():
    config = configs.default()
    configs.override_all(config, ["model.name=team"])
    with pytest.raises(UserError, match="model.num_experts is 2: expected 1 with model.name=team"):
        configs.check(config)
    assert isinstance(_team()[0], Team)
