"""EED: who is chosen, that the choice stands, what is trained and what rests."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_images

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import model as models
from advmoe_jax.ops import diversity, losses, teams
from advmoe_jax.pruning import pruned, random_weights
from advmoe_jax.systems import dverge, eed, team_choice, team_loss
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH = (8, 8, 1), 4, 24, 8
ATTACK = "pgd(num_steps=1,keep=last)"


def _config(*overrides):
    config = configs.default(system="eed", model="team")
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=4", "model.num_members=2",
        "system.team_rate=1/2", "system.member_rate=3/4", f"data.batch_size={BATCH}", "data.name=digits",
        "train.length=4 steps", "init_from=base,a,b,c", f"train.attack={ATTACK}", f"system.rd_by={ATTACK}",
        "system.rd_images=16", "data.pad=0", "data.flip=false", "attack.eps=0.1", *overrides,
        *(["system.dverge_steps=2"] if not any(text.startswith("system.host=") for text in overrides) else [])])
    return config


@functools.cache
def _data():
    """Those that choose the best checkpoint are no test images."""
    found = random_images.data(COUNT)
    return dataclasses.replace(found, test=dataclasses.replace(found.test))


@functools.cache
def _sources(rate="3/4"):
    """A dense run, and three that keep other random weights of it."""
    config = _config()
    team = models.make(config.model, SHAPE, CLASSES)
    variables = jax.device_get(jax.jit(team.member.init)(jax.random.key(3)))
    linear = variables["params"]["backbone"]["linear"]
    linear["kernel"] = 100 * linear["kernel"]
    found = {"base": Source(None, config, team.member, variables, {}, 0)}
    for number, name in enumerate("abc"):
        subject = pruned.of(None, variables, team.member.layers, rate, "every")
        left = pruned.choose(subject, "random_weights", random_weights.Config(method_seed=number))
        found[name] = Source(None, config, team.member, jax.device_get(left.variables), jax.tree.map(
            np.asarray, left.masks), number)
    return found


def _made(*overrides, sources=None, kept=None):
    config = _config(*overrides)
    configs.check(config)
    model = models.make(config.model, SHAPE, CLASSES)
    return eed.make(config, model, _data(), meshes.make(), _sources() if sources is None else sources, kept)


@functools.cache
def _system(*overrides):
    return _made(*overrides)


@functools.cache
def _run(*overrides):
    """The states before the first step and after two, and the metrics."""
    system, mesh = _system(*overrides), meshes.make()
    state = system.init(rng.key(0, "init"))
    first = jax.device_get(state)
    for step in range(2):
        state, metrics = loop.iterate(system, state, step, 3, lambda _: pipeline.device_batch(
            mesh, _data().train, np.arange(BATCH)))
    return first, jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize("rd_attack", [pytest.param(name, marks=pytest.mark.slow if name == "pool_average" else ())
                                       for name in team_choice.ATTACKED])
def test_the_ranking_is_that_of_the_failures(rd_attack):
    config, sources = _config(f"system.rd_attack={rd_attack}"), _sources()
    pool, bases = team_choice.pool_of(sources)
    images = team_choice.images_of(_data(), "training", 16)
    member, mesh = models.make(config.model, SHAPE, CLASSES).member, meshes.make()
    fails, own = team_choice.failures(pool, bases, member, images, config, mesh)
    assert fails.shape == own.shape == (3, 16) and list(pool) == ["a", "b", "c"] and list(bases) == ["base"]
    found = team_choice.choose(fails, 1 - own.mean(1), 2, config.system, 0)
    rd = diversity.robust_diversity(fails, diversity.teams_of(3, [2]))
    assert found["diversity"] == rd.max() and [of for _, of in found["teams"]] == sorted(rd.round(6), reverse=True)
    robust = 1 - own.mean(1)
    assert robust[found["team"][0]] >= robust[found["team"][1]], "the most robust member is asked first"
    if rd_attack == "own_whitebox":
        np.testing.assert_array_equal(fails, own)


def test_the_images_of_a_base_are_what_it_fails_on():
    config, sources, mesh = _config(), _sources(), meshes.make()
    images = team_choice.images_of(_data(), "validation", 16)
    assert images[0].shape == (4, *SHAPE) and images[0].dtype == np.float32 and images[0].max() <= 1
    member = models.make(config.model, SHAPE, CLASSES).member
    base = sources["base"]
    fails, _ = team_choice.failures({"b": base}, {"base": base}, member, images, config, mesh)
    x, y = images
    logits = member.outputs_fn(base.variables)(x)[0]
    assert fails.mean() >= np.mean(np.argmax(logits, -1) != y)


def _chosen(fails, size=2, **system):
    fails = np.asarray(fails, bool)
    system = types.SimpleNamespace(**({"choose": "budget_fill", "rd_threshold": 0.7} | system))
    return team_choice.choose(fails, 1 - fails.mean(1), size, system, 0)


def test_rules_of_choice():
    fails = [[1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 1]]
    found = _chosen(fails)
    assert sorted(found["team"]) == [0, 2] and found["diversity"] == 1 and not found["falls_back"]
    assert found["team"] == [0, 2], "the one that fails less comes first"
    three = _chosen(fails, 3)
    assert len(three["team"]) == 3 and three["diversity"] < 1
    assert len(three["teams"]) == 6 + 4 and three["teams"][0] == ["0 2", 1.0]
    pair = _chosen(fails, 3, choose="smallest_above_threshold")
    assert pair["team"] == [0, 2]
    same = _chosen([[1, 0], [1, 0], [1, 0]], choose="smallest_above_threshold")
    assert same["falls_back"] and same["diversity"] == 0 and len(same["team"]) == 2
    drawn = {tuple(sorted(team_choice.choose(np.asarray(fails, bool), np.zeros(4), 2, types.SimpleNamespace(
        choose="random", rd_threshold=0.7), seed)["team"])) for seed in range(20)}
    assert len(drawn) > 3


def test_a_team_is_as_large_as_the_budget_allows():
    from advmoe_jax.core.shares import share
    for team, member, size in (("0.8", "0.95", 4), ("0.5", "0.95", 10), ("0.9", "0.95", 2), ("0.8", "0.9", 2)):
        assert team_choice.size_of_team(share(team), share(member)) == size


def test_what_is_chosen_stands():
    """The state begins as the chosen runs are, and a second start takes what the first one wrote."""
    system = _system()
    kept = system.files["team.json"]
    names = [kept["pool"][i]["name"] for i in kept["team"]]
    state = jax.device_get(system.init(rng.key(0, "init")))
    for group, name in zip(("member0", "member1"), names):
        jax.tree.map(np.testing.assert_array_equal, state.params[group], _sources()[name].variables["params"])
        jax.tree.map(np.testing.assert_array_equal, state.masks[group], _sources()[name].masks)
    other = kept | {"team": [of for of in range(3) if of not in kept["team"]] + kept["team"][:1]}
    again = _made(kept=other)
    assert again.files["team.json"]["team"] == other["team"], "it is not chosen anew"
    assert _made("system.rd_images=15", kept=other).files["team.json"]["team"] != other["team"], "by another rule it is"
    alone = _made(sources={})
    assert alone.describe == system.describe and not alone.files


HOSTS = {"dverge": (), "none": ("system.host=none",), "adp": ("system.host=adp", "system.loss=trades"),
         "gal": ("system.host=gal", "system.gamma=0")}


@pytest.mark.parametrize("host", [pytest.param(host, marks=() if host == "none" else pytest.mark.slow)
                                  for host in HOSTS])
def test_members_stay_as_sparse_as_they_were(host):
    first, last, metrics = _run(*HOSTS[host])
    for group in ("member0", "member1"):
        before, after, masks = (tree.named_leaves(part[group]) for part in (first.params, last.params, first.masks))
        for path, mask in masks.items():
            full = np.broadcast_to(mask, after[path].shape)
            assert not np.any(after[path][~full]), path
            assert np.any(after[path] != before[path]) and (mask.sum() < mask.size) >= path.endswith("kernel")
        assert tree.named_leaves(last.masks[group]).keys() == masks.keys()
    assert metrics["train/non_finite"] == -1 and np.isfinite(metrics["train/loss"])
    assert ("train/host" in metrics) == (host != "none") and ("train/active" in metrics) == (host != "gal")


@pytest.mark.parametrize("more", [(), (
    "system.wrong_form=each", "system.weights_form=sum", "system.activity_form=printed", "system.loss=natural",
    "system.omega=2")], ids=str)
def test_the_loss_is_the_sum_of_its_terms(more):
    config = _config("system.host=none", *more)
    system, team = config.system, models.make(config.model, SHAPE, CLASSES)
    first = jax.device_get(_system("system.host=none").init(rng.key(0, "init")))
    trained = dataclasses.replace(team.in_training(config.train), taps=True)
    x = jax.random.uniform(jax.random.key(0), (2, BATCH, *SHAPE))
    y = jnp.arange(BATCH) % CLASSES
    batch = {"image": x[0], "adversarial": x[1][:, None], "label": y}
    loss, (_, parts) = jax.jit(team_loss.objective(trained, config))(first, batch)
    shown = x[0] if system.loss == "natural" else x[1]
    _, aux, _ = jax.jit(trained.train_pass)(first.variables, shown[:, None])
    logits = aux["member_logits"][:, 0]
    h = jax.nn.softmax(logits)
    members = sum(losses.cross_entropy(logits[:, i], y).mean() for i in range(2))
    wrong = teams.misclassified(h, y, system.wrong_form).mean()
    sizes = []
    for group, params in first.params.items():
        masks = tree.named_leaves(first.masks[group])
        kernels = {path: leaf for path, leaf in tree.named_leaves(params).items() if path.endswith("kernel")}
        total = sum(np.abs(leaf).sum() for leaf in kernels.values())
        left = sum(int(masks[path].sum()) for path in kernels)
        sizes.append(total / (left if system.weights_form == "mean" else 1))
    activity = aux["activity"].mean() if system.activity_form == "smooth" else 2 * CLASSES
    expected = members + system.omega * wrong + system.gamma * (
        system.lambda_weights * sum(sizes) + system.lambda_activity * activity)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(parts["wrong"]) == pytest.approx(float(wrong), rel=1e-4)
    soft = losses.one_hot(y, CLASSES, 0.3)  # as label smoothing and mixup make them: of the members' loss alone
    smoothed, _ = jax.jit(team_loss.objective(trained, config))(first, batch | {"target": soft})
    learnt = sum(losses.cross_entropy(logits[:, i], soft).mean() for i in range(2))
    assert abs(float(learnt - members)) > 0.01
    assert float(smoothed - loss) == pytest.approx(float(learnt - members), rel=1e-2, abs=1e-3)


def test_images_that_look_like_another_to_a_member():
    config, first = _config(), _system().init(rng.key(0, "init"))
    team = models.make(config.model, SHAPE, CLASSES).in_training(config.train)
    x, y = jax.random.uniform(jax.random.key(0), (BATCH, *SHAPE)), jnp.zeros(BATCH, int)
    index, key = jnp.arange(BATCH), jax.random.key(1)

    def made(eps, num_steps=5, attack=None):
        run = dverge.beside(attack, team, eps=eps, num_steps=num_steps, per_epoch=3, seed=0)
        return jax.jit(lambda variables, step: run(variables, key, x, y, index, step))(first.variables, 1)

    both = made("0.1", attack=lambda *args: args[2][:, None] / 2)
    np.testing.assert_allclose(both[:, 0], x / 2)
    found = both[:, 1:]
    assert found.shape == (BATCH, 2, *SHAPE)
    assert np.abs(found - x[:, None]).max() <= 0.1 + 1e-6 and found.min() >= 0 and found.max() <= 1
    assert np.any(found[:, 0] != found[:, 1]), "each member has images of its own"
    np.testing.assert_array_equal(made("0", 1), jnp.stack([x, x], 1))


@pytest.mark.parametrize("overrides, said", [
    (["init_from="], "needs init_from"), (["model.name=ensemble"], "expected team with system.name=eed"),
    (["model.num_members=3"], "expected 2, as team_rate 1/2 and member_rate 3/4 allow"),
    (["system.member_rate=1/4"], "two members that lack so much do not lack 1/2"),
    (["system.choose=smallest_above_threshold", "system.team_rate=1/4", "model.num_members=3"], "2, as system.choose"),
    (["system.rd_by=pgd fgsm"], "expected one attack"), (["system.rd_by=exits"], "expected one attack"),
    (["train.remat=true"], "train.remat is true"), (["system.adp_entropy=1"], "no effect here"),
    (["system.gamma=0", "system.lambda_weights=1"], "no effect here"), (["model.width=8"], "of another architecture"),
    (["system.member_rate=7/8", "system.team_rate=3/4"], "keeps 0.25"),
    (["data.name=cifar10"], "a run on digits: expected runs on cifar10")])
def test_bad_input_is_said_in_a_line(overrides, said):
    with pytest.raises(UserError) as error:
        _made(*overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_pool_that_is_too_small():
    few = {name: _sources()[name] for name in ("base", "a")}
    with pytest.raises(UserError, match="init_from names 1 pruned runs: expected 2 or more"):
        _made(sources=few)
    pool = {name: _sources()[name] for name in "abc"}
    with pytest.raises(UserError, match="names 0 runs that are not pruned: expected one"):
        _made(sources=pool)
