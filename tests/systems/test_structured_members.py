"""Teams of members of which whole units went: filters, blocks, grouped kernels."""

import functools
import importlib
import math

import jax
import numpy as np
import pytest
import random_images
from tiny import REPO

from advmoe_jax.core import config as configs
from advmoe_jax.core import masked, recipe, rng, shares, tree
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import model as models
from advmoe_jax.pruning import pruned
from advmoe_jax.systems import eed, prune, team_choice
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, BATCH = (8, 8, 1), 4, 8
ATTACK, DATA = "pgd(num_steps=1,keep=last)", random_images.data(16)
WAYS = {"filters": ("random_weights", "every", "system.unit=filter"),
        "blocks": ("magnitude", "every", "system.unit=block(4,1)"),
        "grouped": ("srgkp", "3x3", "system.groups=4")}


def _config(*overrides):
    config = configs.default(system="eed", model="team")
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=8", "model.num_members=2",
        "system.team_rate=1/5", "system.member_rate=3/5", "system.host=none", "system.gamma=0", "system.loss=madry",
        f"data.batch_size={BATCH}", "data.name=digits", "train.length=4 steps", "init_from=base,a,b",
        f"train.attack={ATTACK}", f"system.rd_by={ATTACK}", "system.rd_images=8", "data.pad=0", "data.flip=false",
        "optim.backbone.weight_decay=0.1", *overrides])
    return config


@functools.cache
def _base():
    team = models.make(_config().model, SHAPE, CLASSES)
    variables = jax.device_get(jax.jit(team.member.init)(jax.random.key(3)))
    return team, Source(None, _config(), team.member, variables, {}, 0)


def _copy(method, kernels, *fields, rate="3/4"):
    """A run that a method pruned."""
    config = configs.default(system="prune", data="digits")
    configs.override_all(config, [f"system.method={method}", f"system.rate={rate}", *fields])
    member, base = _base()[0].member, _base()[1]
    subject = pruned.of(None, base.variables, member.layers, rate, kernels)
    module = importlib.import_module(f"advmoe_jax.pruning.{method}")
    left = pruned.choose(subject, method, prune.own_config(module, config.system))
    return Source(None, config, member, jax.device_get(left.variables), jax.tree.map(np.asarray, left.masks), 0)


@functools.cache
def _pool():
    return {name: _copy(*way) for name, way in WAYS.items()}


@pytest.mark.parametrize("pair", [("filters", "grouped"), pytest.param(("blocks", "filters"), marks=pytest.mark.slow)])
def test_a_team_of_structured_members_keeps_their_masks(pair):
    """Members whose masks differ in what they cover, trained with momentum and weight decay."""
    config, mesh = _config(), meshes.make()
    configs.check(config)
    sources = {"base": _base()[1]} | {name: _pool()[name] for name in pair}
    system = eed.make(config, _base()[0], DATA, mesh, sources)
    found = system.files["team.json"]
    names = [found["pool"][i]["name"] for i in found["team"]]
    assert sorted(names) == sorted(pair)
    state = system.init(rng.key(0, "init"))
    first = jax.device_get(state)
    for step in range(2):
        state, _ = loop.iterate(system, state, step, 2, lambda _: pipeline.device_batch(
            mesh, DATA.train, np.arange(BATCH)))
    last = jax.device_get(state)
    for group, name in zip(("member0", "member1"), names):
        masks = tree.named_leaves(last.masks[group])
        given = {path.removeprefix("backbone/"): mask for path, mask in tree.named_leaves(_pool()[name].masks).items()}
        assert sorted(path.split("backbone/")[-1] for path in masks) == sorted(given)
        before, after = (tree.named_leaves(of.params[group]) for of in (first, last))
        for path, mask in masks.items():
            np.testing.assert_array_equal(mask, given[path.split("backbone/")[-1]])
            full = np.broadcast_to(mask, after[path].shape)
            assert not np.any(after[path][~full]) and np.any(after[path] != before[path]), path
            assert not full.all() or name != "filters" and not path.endswith("kernel"), "a filter goes with its norm"
    shapes = {path: leaf.shape for path, leaf in tree.named_leaves(first.params).items()}
    assert system.model.costs(last.masks)["params"] == masked.kept(shapes, last.masks)


@pytest.mark.parametrize("unit, rate, fits", [
    ("filter", "3/5", True), ("filter", "3/8", False), ("block(4,1)", "3/5", False), ("weight", "3/5", True),
    ("weight", "1/2", False)])
def test_members_may_round_up_to_whole_units(unit, rate, fits):
    """4 of 8 filters where 3.2 would stay; but 5 are too many, and so is a linear layer that stays whole beside blocks.
    """
    member = _base()[0].member
    pool = {name: _copy("magnitude", "every", f"system.unit={unit}", rate=rate) for name in "ab"}

    def check():
        team_choice.check_pool(pool, member, 2, shares.share("3/5"), "digits")

    if fits:
        return check()
    with pytest.raises(UserError, match="init_from names a, which keeps 0.* of its weights: expected 0.4"):
        check()


@functools.cache
def _recipe(units):
    return recipe.load(f"{REPO}/configs/eed_digits.py:units={units}")


@pytest.mark.parametrize("units, unit", [("filter", "filter"), ("block", "block(4,1)"), ("srgkp", None)])
def test_the_recipe_makes_a_structured_pool(units, unit):
    runs = _recipe(units).runs
    pool = [name for name in runs["eed-none-s0"].init_from.split(", ") if name != "base-s0"]
    assert len(pool) == 12 and len({(str(runs[name].system), runs[name].data.part, runs[name].data.part_draw)
                                    for name in pool}) == 12
    for name in pool:
        source = runs[runs[name].init_from.removesuffix("@last")] if unit else runs[name]
        assert source.system.name == ("mask_search" if unit else "prune") and source.init_from == "base-s0"
        assert source.system.get("unit") == unit and runs[name].system.method == ("given" if unit else "srgkp")
    assert (runs["harp-s0"] if unit else runs["single-s0"]).system.method == ("given" if unit else "srgkp")
    assert runs["random-0-s0"].system.unit == (unit or "grouped(8)")
    assert _recipe("weight").runs.keys() == recipe.load(f"{REPO}/configs/eed_digits.py").runs.keys()


@pytest.mark.parametrize("units", ["filter", "block", "srgkp"])
def test_members_of_the_recipe_are_small_enough(units):
    """Counted, not computed: of each layer so many units as a mask of this share keeps."""
    config, run = _recipe(units).runs["eed-none-s0"], _recipe(units).runs["random-0-s0"]
    config.model.depth = 18
    layers = models.make(config.model, SHAPE, 10).member.layers
    _, pruned_layers = pruned.layers_of_rate(layers, run.system.kernels, "", run.system.unit)
    total, left = (sum(math.prod(spec.kernel) for spec in of) for of in (
        layers, [spec for spec in layers if spec not in pruned_layers]))
    for spec in pruned_layers:
        size = math.prod(spec.kernel)
        unit = {"filter": math.prod(spec.kernel[:-1]), "block": 4, "srgkp": size // spec.kernel[2]}[units]
        left += unit * shares.kept(size // unit, 1 - shares.share(run.system.rate))
    assert len(pruned_layers) > 15
    assert 0.5 < left / total / float(1 - shares.share(config.system.member_rate)) <= 1


def test_units_that_are_none():
    with pytest.raises(UserError, match="unknown units in the recipe's argument 'filters'.*did you mean 'filter'"):
        _recipe("filters")
