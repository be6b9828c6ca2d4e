"""The search for masks: what begins, what rests, what is kept, and what the next run takes."""

import dataclasses
import functools

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
from advmoe_jax.models import network
from advmoe_jax.pruning import magnitude, pruned
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning import search as searching
from advmoe_jax.systems import mask_search, prune, rst
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import checkpoint, loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH, STEPS = (8, 8, 1), 4, 32, 16, 4
DATA = random_images.data(COUNT)
CASES = {"hydra": (), "harp": ("system.learn_rates=true", "optim.backbone.learning_rate=0.5")}


def _config(*overrides, system="mask_search"):
    config = configs.default(system=system)
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=8", f"data.batch_size={BATCH}",
        f"train.length={STEPS} steps", "init_from=base", "system.loss=natural", "optim.backbone.schedule=constant",
        "optim.backbone.learning_rate=5", "data.pad=0", "data.flip=false", *overrides])
    return config


@functools.cache
def _base():
    net = network.make(_config().model, SHAPE, CLASSES)
    return net, jax.device_get(jax.jit(net.init)(jax.random.key(3)))


def _system(*overrides, masks=None):
    config, (net, variables) = _config(*overrides), _base()
    source = Source(None, config, net, variables, masks or {}, 0)
    return mask_search.make(config, net, DATA, meshes.make(), {"base": source})


@functools.cache
def _run(case):
    """The system, and its states before the first step and after the last."""
    system, mesh = _system(*CASES[case]), meshes.make()
    state = system.init(rng.key(0, "init"))
    first = jax.device_get(state)
    for step in range(system.length):
        rows = np.arange(BATCH) + BATCH * (step % 2)
        state, metrics = loop.iterate(system, state, step, 2, lambda _, rows=rows: pipeline.device_batch(
            mesh, DATA.train, rows))
    return system, first, jax.device_get(state), metrics


def _by_hand(scores, keep):
    """Of each kernel a mask of the largest scores, sorted one by one."""
    found = {}
    for path, score in scores.items():
        flat = np.abs(np.asarray(score)).ravel()
        order = sorted(range(flat.size), key=lambda i: (-flat[i], i))
        found[path] = np.isin(np.arange(flat.size), order[:flat.size - int((1 - keep) * flat.size + 1e-6)])
        found[path] = found[path].reshape(score.shape)
    return found


def _kernel_masks(state):
    return {path: mask for path, mask in tree.named_leaves(state.masks).items() if path.endswith("kernel")}


def test_a_search_begins_with_magnitudes():
    _, first, _, _ = _run("hydra")
    weights = tree.named_leaves(_base()[1]["params"])
    kernels = {path: leaf for path, leaf in weights.items() if path.endswith("kernel")}
    scores = tree.named_leaves(first.extra["search"]["scores"])
    assert scores.keys() == kernels.keys() and len(kernels) == 4, "the first convolution and the linear layer too"
    for path, kernel in kernels.items():
        fan_in = np.prod(kernel.shape[:-1])
        np.testing.assert_allclose(scores[path], np.sqrt(6 / fan_in) * kernel / np.abs(kernel).max(), rtol=1e-6)
    by_hand = _by_hand(kernels, 0.1)
    found = _kernel_masks(first)
    for path, mask in by_hand.items():
        np.testing.assert_array_equal(found[path], mask)
        np.testing.assert_array_equal(tree.named_leaves(first.params)[path], np.where(mask, kernels[path], 0))


def test_scores_are_searched_and_weights_rest():
    _, first, last, _ = _run("hydra")
    assert _same(last.extra["search"]["dense"], _base()[1]["params"])
    scores = tree.named_leaves(last.extra["search"]["scores"])
    masks = _kernel_masks(last)
    for path, mask in _by_hand(scores, 0.1).items():
        np.testing.assert_array_equal(masks[path], mask, err_msg=path)
        assert mask.sum() == mask.size - int(0.9 * mask.size + 1e-6)
    assert not _same(last.masks, first.masks), "the search has found others"
    weights = tree.named_leaves(_base()[1]["params"])
    every = tree.named_leaves(last.masks)
    for path, leaf in tree.named_leaves(last.params).items():
        np.testing.assert_array_equal(leaf, np.where(every.get(path, True), weights[path], 0))
    assert not _same(last.batch_stats, first.batch_stats), "statistics follow the masked network"


def _same(ours, theirs):
    ours, theirs = tree.named_leaves(ours), tree.named_leaves(theirs)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_first_update_is_the_gradient_of_the_masked_weights():
    """The score of w gets dL/d(w m) * w * sign(score), whether w is kept or not."""
    system, first, _, _ = _run("hydra")
    [step] = system.steps
    mesh = meshes.make()
    state = jax.device_put(first, meshes.replicated(mesh))
    batch = step.prepare(state, pipeline.device_batch(mesh, DATA.train, np.arange(BATCH)), step.inputs)

    def loss(params):
        return mask_search.adversarial.objective(system.model, _config())(first.replace(params=params), batch)[0]

    slopes = tree.named_leaves(jax.device_get(jax.jit(jax.grad(loss))(first.params)))
    after = jax.device_get(step.update(state, batch)[0])
    weights, before = _base()[1]["params"], tree.named_leaves(first.extra["search"]["scores"])
    optim = _config().optim.backbone
    for path, score in tree.named_leaves(after.extra["search"]["scores"]).items():
        slope = slopes[path] * tree.named_leaves(weights)[path] * np.sign(before[path])
        expected = optim.learning_rate * (slope + optim.weight_decay * before[path])
        np.testing.assert_allclose(before[path] - score, expected, atol=1e-6 + 1e-4 * np.abs(expected).max())


def test_shares_are_learned_within_the_budget():
    system, first, last, metrics = _run("harp")
    sizes = {path: score.size for path, score in tree.named_leaves(last.extra["search"]["scores"]).items()}
    total = sum(sizes.values())
    kept = [sum(int(np.sum(mask)) for mask in _kernel_masks(state).values()) / total for state in (first, last)]
    assert kept[0] == pytest.approx(0.2, abs=0.01) and 0.09 < kept[1] <= 0.1 + len(sizes) / total
    assert metrics["train/kept"] > 0.1, "the last iteration brings it into the budget"
    rates = tree.named_leaves(last.extra["search"]["rates"])
    assert len({float(q) for q in rates.values()}) == len(sizes), "each layer has its own"
    assert system.first_best == system.length
    scores = tree.named_leaves(last.extra["search"]["scores"])
    for path, mask in _kernel_masks(last).items():
        keep = float(selecting.rate(jnp.float32(rates[path]), 0.1))
        np.testing.assert_array_equal(mask, _by_hand({path: scores[path]}, keep)[path])


def test_a_budget_that_is_met_stays_as_it_is():
    specs = _base()[0].layers
    params = _base()[1]["params"]
    for keep, moves in ((0.5, True), (0.05, True), (0.999, False)):
        how = searching.Search(specs, specs, keep, learns_rates=True)
        before = searching.begin(params, how)
        after = searching.within_budget(before, how)
        assert float(searching.kept(after, how)) <= keep * (1 + 1e-6)
        assert _same(after["rates"], before["rates"]) != moves
        assert float(searching.kept(after, how)) > 0.999 * min(keep, float(searching.kept(before, how)))


def test_filters_go_with_the_norm_behind_them():
    system = _system("system.unit=filter", "system.kernels=3x3", "system.rate=1/2")
    state = jax.device_get(system.init(rng.key(0, "init")))
    for conv, norm in ("conv1", "bn1"), ("conv2", "bn2"):
        block = state.params["backbone"]["layer1_0"]
        gone = ~block[conv]["kernel"].any((0, 1, 2))
        assert gone.sum() == 4 and not block[norm]["scale"][gone].any() and block[norm]["scale"][~gone].all()
    assert np.all(state.params["backbone"]["conv1"]["kernel"])


def test_a_unit_gets_the_gradient_of_all_its_weights():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    slope = jax.random.normal(jax.random.key(1), kernel.shape)

    def value(scores, keep):
        mask = selecting.select_through({"a": jnp.abs(scores)}, keep, unit="filter")["a"]
        return jnp.sum(slope * mask)

    found = jax.grad(value)(kernel, "1/2")
    np.testing.assert_allclose(found, jnp.sign(kernel) * jnp.sum(slope, (0, 1, 2), keepdims=True), rtol=1e-5)
    scores, share = jax.grad(lambda s, k: value(s, {"a": k}), (0, 1))(kernel, jnp.float32(0.5))
    np.testing.assert_allclose(scores, found, rtol=1e-5)
    np.testing.assert_allclose(share, jnp.sum(slope), rtol=1e-5)


def test_a_pruning_run_takes_what_was_found():
    _, _, last, _ = _run("hydra")
    config, (net, _) = _config("system.method=given", system="prune"), _base()
    source = Source(None, config, net, jax.tree.map(np.asarray, last.variables), last.masks, 0)
    state = jax.device_get(prune.make(config, net, DATA, meshes.make(), {"base": source}).init(rng.key(1, "init")))
    assert _same(state.params, last.params) and _same(state.batch_stats, last.batch_stats)
    found, wanted = _kernel_masks(state), _kernel_masks(last)
    assert found.keys() == wanted.keys() and all(np.array_equal(found[path], wanted[path]) for path in found)


@pytest.mark.parametrize("case", ["hydra", "harp"])
def test_a_checkpoint_holds_the_search(case, tmp_path):
    system, _, last, _ = _run(case)
    with checkpoint.opened(tmp_path) as saved:
        saved.save("last", int(last.step), last, {})
        restored = saved.restore_newest(loop.abstract_state(system, meshes.make()), print)
        trained = saved.restore_trained("last", system.model.shapes)
    assert _same(jax.device_get(restored), last)
    assert _same(trained.masks, last.masks) and _same(trained.variables["params"], last.params)


def test_magnitude_prunes_the_same_layers():
    """So that what was found is compared at the same sparsity."""
    net, variables = _base()
    subject = pruned.of(None, variables, net.layers, "9/10", "every")
    found = pruned.choose(subject, "magnitude", magnitude.Config())
    first = _kernel_masks(_run("hydra")[1])
    masks = {path: mask for path, mask in tree.named_leaves(found.masks).items() if path.endswith("kernel")}
    assert masks.keys() == first.keys() and all(np.array_equal(masks[path], first[path]) for path in masks)


@pytest.mark.parametrize("score", ["nis", "bnsf", "ase"])
def test_a_search_begins_with_another_score(score):
    more = ("system.loss=madry", "train.attack=pgd(num_steps=1,keep=last)", "system.images=6") if score == "ase" else ()
    state = jax.device_get(_system(f"system.score={score}", *more).init(rng.key(0, "init")))
    scores = tree.named_leaves(state.extra["search"]["scores"])
    weights = tree.named_leaves(_base()[1]["params"])
    for path, mask in _by_hand(scores, 0.1).items():
        np.testing.assert_array_equal(_kernel_masks(state)[path], mask, err_msg=path)
        assert np.all(scores[path] * weights[path] >= 0)
        assert np.abs(scores[path]).max() == pytest.approx(np.sqrt(6 / np.prod(scores[path].shape[:-1])), rel=1e-5)
    inner = "backbone/layer1_0/conv1/kernel"
    other = np.abs(scores[inner]) / np.abs(weights[inner])
    if score != "bnsf":  # a fresh norm changes nothing
        assert other.max() > 1.01 * other.min(), "it is no multiple of the weights"


def test_sub_models_of_one_shape_share_their_programs():
    """Other scores, images and weights are arguments: nothing is compiled again."""
    from jax._src import monitoring
    events = []
    monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))

    def trained(score, rows):
        net, variables = _base()
        config = _config(f"system.score={score}", f"data.part_draw={score}", "data.part=0+1 of 2")
        data = dataclasses.replace(DATA, rows=rows)
        variables = jax.tree.map(lambda leaf: leaf + len(score) / 100, variables)
        system, mesh = mask_search.make(config, net, data, meshes.make(), {
            "base": Source(None, config, net, variables, {}, 0)}), meshes.make()
        del events[:]
        state = system.init(rng.key(0, "init"))
        for step in range(2):
            state, _ = loop.iterate(system, state, step, 2, lambda _: pipeline.device_batch(mesh, data.train, rows))
        left = prune.make(_config("system.method=given", system="prune"), net, data, mesh, {"base": Source(
            None, config, net, *(jax.tree.map(np.asarray, part) for part in (state.variables, state.masks)), 0)})
        state, _ = loop.iterate(left, left.init(rng.key(0, "init")), 0, 2, lambda _: pipeline.device_batch(
            mesh, data.train, rows))
        return events.count("cache_misses"), events.count("cache_hits")

    try:
        trained("nis", np.arange(BATCH))
        jax.clear_caches()
        misses, hits = trained("bnsf", np.arange(BATCH) + 7)
        assert misses == 0 and hits > 5
    finally:
        monitoring.clear_event_listeners()


def test_a_scratch_ticket_is_searched_among_signs():
    config = _config(system="rst")
    config.init_from = ""
    configs.check(config)
    state = jax.device_get(rst.make(config, _base()[0], DATA, meshes.make(), {}).init(rng.key(0, "init")))
    scores, masks = tree.named_leaves(state.extra["search"]["scores"]), _kernel_masks(state)
    for path, kernel in tree.named_leaves(state.extra["search"]["dense"]).items():
        if path.endswith("kernel"):
            np.testing.assert_allclose(np.abs(kernel), np.sqrt(2 / np.prod(kernel.shape[:-1])), rtol=1e-6)
            assert 0.2 < np.mean(kernel > 0) < 0.8 and len(np.unique(np.abs(scores[path]))) > scores[path].size / 2
            np.testing.assert_array_equal(masks[path], _by_hand({path: scores[path]}, 0.1)[path])
    config.init_from = "base"
    with pytest.raises(UserError, match="expected nothing with system.name=rst"):
        configs.check(config)


@pytest.mark.parametrize("overrides, said", [
    (["system.images=5"], "which has no effect here"), (["system.score=niss"], "did you mean 'nis'"),
    (["system.score=magnitude"], "expected advmoe_jax/pruning/magnitude.py to define score"),
    (["init_from="], "system.name=mask_search needs init_from"), (["system.rate=1"], "system.rate is '1': expected"),
    (["system.rate=x"], "system.rate is 'x'"), (["system.unit=filters"], "did you mean 'filter'"),
    (["train.ema=0.9"], "train.ema is 0.9: expected 0"), (["system.budget_weight=2"], "which has no effect here"),
    (["system.learn_rates=true", "system.scope=global"], "expected scope layer"),
    (["system.unit=grouped", "system.scope=global"], "system.scope is 'global'"),
    (["system.skip=("], "skip is '('"), (["system.skip=."], "no convolution or linear layer"),
    (["model.width=16"], "of another architecture"), (["system.method=given"], "system.method is a field of")])
def test_bad_input_is_said_in_a_line(overrides, said):
    with pytest.raises(UserError) as error:
        config = _config(*overrides)
        configs.check(config)
        source = Source(None, config, *_base(), {}, 0)
        net = network.make(config.model, SHAPE, CLASSES)
        mask_search.make(config, net, DATA, meshes.make(), {"base": source})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_pruned_run_is_not_searched():
    with pytest.raises(UserError, match="init_from names base, which is pruned already"):
        _system(masks={"backbone": {"conv1": {"kernel": np.ones((3, 3, 1, 8), bool)}}})
