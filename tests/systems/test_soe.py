"""SoE as EED's host: whom its images attack, what its loss is, and heads that checkpoints keep and no answer reads."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import arrays, assert_same_bits

from advmoe_jax import main
from advmoe_jax.core import config as configs
from advmoe_jax.core import status, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import flags as suspicions
from advmoe_jax.models import model as models
from advmoe_jax.ops import losses
from advmoe_jax.pruning import pruned, random_weights
from advmoe_jax.systems import soe, team_loss
from advmoe_jax.train import checkpoint
from advmoe_jax.train import state as states

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, BATCH, M = (8, 8, 1), 10, 8, 2
ATTACK = "pgd(num_steps=1,step_size=1 eps,keep=last)"
MEMBER = {"model.num_experts": 1, "model.model_scale": 1.0, "model.depth": 4, "model.width": 4, "data.name": "digits",
          "data.batch_size": 32, "attack.eps": "0.1", "train.attack": ATTACK}
TEAM = MEMBER | {
    "model.num_members": M, "model.gate": "never", "system.team_rate": "1/2", "system.member_rate": "3/4",
    "system.host": "soe", "system.soe_weight": 0.5, "system.soe_sigma": 0.7, "system.gamma": 0.0,
    "system.rd_by": ATTACK, "system.rd_images": 16, "init_from": "base, a, b", "train.length": "4 steps",
    "train.eval_every": "4 steps", "train.save_every": "2 steps", "train.select_attack": "fgsm",
    "train.select_examples": 16, "eval.attacks": "fgsm", "eval.n": 8, "eval.black_box": False}


def _config(**more):
    config = configs.default(system="eed", model="team", data="digits")
    for name, value in (TEAM | more).items():
        configs.override(config, f"{name}={value}")
    return config


@functools.cache
def _team():
    config = _config()
    return models.make(config.model, SHAPE, CLASSES).in_training(config.train)


@functools.cache
def _state():
    """That of a team with heads that say something."""
    state = soe.begin(states.fresh(jax.jit(_team().init)(jax.random.key(0)), {}), _team())
    heads = jax.tree.map(lambda leaf: leaf + jnp.linspace(0.1, 1, leaf.size).reshape(leaf.shape), state.extra[soe.NAME])
    return state.replace(extra={soe.NAME: heads})


def _images():
    return jax.random.uniform(jax.random.key(1), (BATCH, *SHAPE)), jnp.arange(BATCH) % CLASSES


def test_each_member_is_attacked():
    x, y = _images()
    team, variables = _team(), _state().variables

    @jax.jit
    def run(variables):
        found = soe.beside(lambda *args: args[2][:, None] / 2, team, _config())(
            variables, jax.random.key(2), x, y, jnp.arange(BATCH), 0)
        return found, [losses.cross_entropy(team.member.outputs_fn(of)(jnp.concatenate([x, *jnp.moveaxis(
            found[:, 1:], 1, 0)]))[0], jnp.tile(y, M + 1)).reshape(M + 1, BATCH) for of in team.members(variables)]

    found, surprise = run(variables)
    assert found.shape == (BATCH, 1 + M, *SHAPE)
    np.testing.assert_array_equal(found[:, 0], x / 2)
    assert np.abs(found[:, 1:] - x[:, None]).max() <= 0.1 + 1e-6
    for i, of in enumerate(surprise):
        clean, own, others = of[0], of[1 + i], of[2 - i]
        assert own.mean() > clean.mean() and own.mean() > others.mean(), "whoever is attacked suffers most"


def test_the_loss_reaches_heads_and_members():
    team, state, part = dataclasses.replace(_team(), features=True), _state(), soe.part()
    config, (x, y) = _config(**{"system.omega": 0}), _images()
    noise = jax.random.uniform(jax.random.key(3), (BATCH, 1 + M, *SHAPE))
    batch = {"image": x, "adversarial": noise, "label": y}

    @jax.jit
    def run(state):
        def of(owned):
            return team_loss.objective(team, config)(part.put(state, owned), batch)

        _, aux, _ = team.train_pass(state.variables, jnp.concatenate([x[:, None], noise], 1))
        return jax.value_and_grad(of, has_aux=True)(part.get(state)), aux

    ((loss, (_, parts)), slopes), aux = jax.device_get(run(state))
    state = jax.device_get(state)
    logits, features = aux["member_logits"].astype(np.float64), aux["features"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.take_along_axis(p, np.asarray(y)[:, None, None, None], -1)[..., 0]  # (B, P, M)
    linear = team.last_layer.path
    total = 0
    for attacked in (2, 3):
        shown = right[:, attacked]
        for j, group in enumerate(team.groups):
            head, params = state.extra[soe.NAME][group], tree.named_leaves(state.params[group])
            kernel, bias = (params[f"{linear}/{name}"] for name in ("kernel", "bias"))
            np.testing.assert_allclose(features[:, attacked, j] @ kernel + bias, logits[:, attacked, j], atol=1e-4)
            said = 1 / (1 + np.exp(-(features[:, attacked, j] @ np.asarray(head["kernel"]) + head["bias"])))
            total += np.mean(-shown[:, j] * np.log(said) - (1 - shown[:, j]) * np.log(1 - said))
        total += np.mean(-0.7 * np.log(np.sum(shown ** (1 / 0.7), -1)))
    assert float(parts["host"]) == pytest.approx(0.5 * total, rel=1e-3)
    assert float(loss) > float(parts["host"]) > 0
    for group in team.groups:
        for name, slope in tree.named_leaves(slopes[group]).items():
            assert np.any(slope != 0) or name.endswith("conv1/bias"), f"{group}/{name}"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished team, of a dense run and two that are pruned, and the masks of these."""
    folder, member = tmp_path_factory.mktemp("soe"), _team().member
    variables = jax.device_get(jax.jit(member.init)(jax.random.key(3)))
    kept = {}
    for name in ("base", "a", "b"):
        config = configs.default(data="digits")
        config.update_from_flattened_dict(MEMBER)
        state = states.fresh(variables, {})
        if name != "base":
            subject = pruned.of(None, variables, member.layers, "3/4", "every")
            left = pruned.choose(subject, "random_weights", random_weights.Config(method_seed=ord(name)))
            kept[name] = jax.tree.map(np.asarray, left.masks)
            state = states.fresh(variables, {}, kept[name])
        with checkpoint.opened(folder / name, about={"config": configs.to_json(config)}) as saved:
            for which in ("best", "last"):
                saved.save(which, 0, state, {})
        configs.write(config, folder / name / "config.json")
        status.write(folder / name, "trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(suspicions, "of_model", lambda *_: ())
        assert main.main(_flags("team")) == 0
    return folder / "team", kept


def _flags(workdir):
    pathlib.Path("team.py").write_text(
        "from advmoe_jax.core import config as configs\n\n\ndef get_config():\n"
        "    return configs.default(system='eed', model='team', data='digits')\n")
    return ["--config", "team.py", "--workdir", str(workdir),
            *(f"--config.{name}={value}" for name, value in TEAM.items())]


def test_heads_are_kept_and_masks_stay(workdir):
    folder, kept = workdir
    found = arrays(folder)
    heads = {name: leaf for name, leaf in found.items() if f"['{soe.NAME}']" in name and "['extra']" in name}
    assert len(heads) == 2 * M and all(np.any(leaf != 0) and np.all(np.isfinite(leaf)) for leaf in heads.values())
    team = [of["run"] for of in json.loads((folder / "team.json").read_text())["pool"]]
    order = json.loads((folder / "team.json").read_text())["team"]
    for group, i in zip(("member0", "member1"), order):
        for path, mask in tree.named_leaves(kept[team[i]]["backbone"]).items():
            name = "".join(f"['{part}']" for part in ("params", group, "backbone", *path.split("/")))
            assert not np.any(found[name][~np.broadcast_to(mask, found[name].shape)])
    entry, = (e for e in json.loads((folder / "results.json").read_text())["entries"] if e["checkpoint"] == "last")
    assert 0 <= entry["ra"] <= entry["sa"] <= 1


def test_it_continues_where_it_was(workdir, tmp_path, monkeypatch):
    folder, _ = workdir
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(suspicions, "of_model", lambda *_: ())
    again = folder.parent / "again"
    shutil.copytree(folder, again)
    for which in ("best", "last"):
        shutil.rmtree(again / "checkpoints" / which / "4", ignore_errors=True)
    assert main.main(_flags("again")) == 0
    assert_same_bits(folder, again)


@pytest.mark.parametrize("fields, said", [
    ({"system.loss": "natural"}, "system.loss is natural: expected another one with system.host=soe"),
    ({"train.remat": True}, "train.remat is true: expected false with system.host=soe"),
    ({"train.attack": "exits"}, "train.attack is 'exits': expected attacks on a single network"),
    ({"system.soe_sigma": 0}, "system.soe_sigma is 0"), ({"system.dverge_steps": 2}, "no effect here")])
def test_bad_input_is_said_in_a_line(fields, said):
    with pytest.raises(UserError) as error:
        configs.check(_config(**fields))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_heads_of_many_members_are_in_their_order():
    """jax sorts names, and so member10 before member2."""
    config = _config(**{"model.num_members": 11})
    team = models.make(config.model, SHAPE, CLASSES)
    heads = {group: {"kernel": jnp.zeros(3), "bias": jnp.float32(i)} for i, group in enumerate(team.groups)}
    state = states.State(0, {}, {}, {}, {}, {soe.NAME: dict(sorted(heads.items()))})
    np.testing.assert_array_equal(soe.confidence(state, team, jnp.ones((1, 1, 11, 3)))[0, 0], np.arange(11))
