"""Pruning as a run: what goes, when, and what stays gone while the rest is trained."""

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_images

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import dotted
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.pruning import pruned
from advmoe_jax.systems import prune
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
SHAPE, CLASSES, COUNT, BATCH, EPOCHS = (8, 8, 1), 4, 32, 16, 3
DATA = random_images.data(COUNT)
PER_EPOCH = COUNT // BATCH


def _config(*overrides):
    config = configs.default(system="prune")
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=8", f"data.batch_size={BATCH}",
        f"train.length={EPOCHS} epochs", "init_from=base", "system.rate=1/2", "optim.backbone.learning_rate=0.05",
        "optim.backbone.schedule=constant", "data.pad=0", "data.flip=false", *overrides])
    return config


@functools.cache
def _base():
    net = network.make(_config().model, SHAPE, CLASSES)
    return net, jax.device_get(jax.jit(net.init)(jax.random.key(3)))


def _system(*overrides, masks=None):
    config, (net, variables) = _config(*overrides), _base()
    sources = {"base": Source(None, config, net, variables, masks or {}, 0)}
    return prune.make(config, net, DATA, meshes.make(), sources)


def _run(system):
    """The state after every iteration, the first before it."""
    state, states = system.init(rng.key(0, "init")), []
    mesh = meshes.make()
    for step in range(system.length):
        states.append(jax.device_get(state))
        rows = np.arange(BATCH) + BATCH * (step % PER_EPOCH)
        state, _ = loop.iterate(system, state, step, PER_EPOCH,
                                lambda _, rows=rows: pipeline.device_batch(mesh, DATA.train, rows))
    return [*states, jax.device_get(state)]


def _gone(state):
    """{leaf: whether all that its mask removes is zero}."""
    params = tree.named_leaves(state.params)
    return {name: not np.any(np.asarray(params[name])[~np.broadcast_to(mask, params[name].shape)])
            for name, mask in tree.named_leaves(state.masks).items()}


@functools.cache
def _trained(method, *overrides):
    system = _system(f"system.method={method}", *overrides)
    return system, _run(system)


def test_what_is_pruned_once_stays_gone():
    system, states = _trained("srgkp")
    masks = states[0].masks
    assert all(all(_gone(state).values()) for state in states)
    for state in states:
        jax.tree.map(np.testing.assert_array_equal, state.masks, masks)
    before, after = (params["backbone"]["conv1"]["kernel"] for params in (_base()[1]["params"], states[-1].params))
    assert not np.array_equal(before, after), "the rest is trained"
    assert system.first_best == 0 and system.length == EPOCHS * PER_EPOCH


def test_filters_are_chosen_again_after_every_epoch():
    _, states = _trained("fpgm")
    assert all(all(_gone(state).values()) for state in states)
    assert _chosen_anew(states[PER_EPOCH])


def _chosen_anew(state):
    """The masks of a state are what its method chooses by its weights, of which those that went are zero."""
    kernel = state.params["backbone"]["layer1_0"]["conv1"]["kernel"]
    mask = np.broadcast_to(state.masks["backbone"]["layer1_0"]["conv1"]["kernel"], kernel.shape)
    return not kernel[~mask].any() and kernel[mask].all() and mask.any((0, 1, 2)).sum() == 4


def test_soft_filters_come_back_between_epochs():
    system, states = _trained("sfp")
    assert system.first_best == PER_EPOCH, "before that all is kept"
    assert np.all(np.asarray(jax.tree.leaves(states[0].masks)[0])), "nothing is gone before the first epoch"
    jax.tree.map(np.testing.assert_array_equal, states[0].params, _base()[1]["params"])
    for step, state in enumerate(states):
        at_the_end = step % PER_EPOCH == 0 and step > 0
        assert all(_gone(state).values()) == (at_the_end or step < PER_EPOCH), step
    assert _chosen_anew(states[-1])


def test_channels_fade():
    period = 4
    system, states = _trained("hesso_decay", f"system.decay_length={period} steps")
    jax.tree.map(np.testing.assert_array_equal, states[0].params, _base()[1]["params"])
    sizes = []
    for state in states:
        kernel, mask = (part["backbone"]["layer1_0"]["conv1"]["kernel"] for part in (state.params, state.masks))
        sizes.append(np.abs(kernel[~np.broadcast_to(mask, kernel.shape)]).mean())
    assert all(a > b for a, b in zip(sizes[:period], sizes[1:])) and not any(sizes[period:]), sizes
    assert all(_gone(states[-1]).values())
    assert system.first_best == 0 and not system.files["pruning.json"]["layers"].keys() - {"layer1.0.conv1"}


def test_what_was_pruned_before_stays_gone_too():
    first = _trained("srgkp")[1][0].masks
    system = _system("system.method=l1norm", masks=first)
    state = jax.device_get(system.init(rng.key(0, "init")))
    before, after = tree.named_leaves(first), tree.named_leaves(state.masks)
    assert before.keys() <= after.keys()
    for name, mask in before.items():
        shape = np.broadcast_shapes(mask.shape, after[name].shape)
        assert not np.any(np.broadcast_to(after[name], shape) & ~np.broadcast_to(mask, shape))
    said = system.files["pruning.json"]
    params = {name: leaf for name, leaf in tree.named_leaves(state.params).items() if name.endswith("conv1/kernel")}
    kept = {dotted(name.removesuffix("/kernel")): [np.count_nonzero(leaf), leaf.size] for name, leaf in params.items()}
    assert kept and kept.items() <= said["weights"].items()


def test_the_masks_of_a_search_are_taken():
    first = _trained("srgkp")[1][0].masks
    system = _system("system.method=given", masks=first)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(system.init(rng.key(0, "init"))).masks, first)
    assert system.files["pruning.json"]["rate"] is None and "7/16" not in system.describe


def test_pruning_json_says_what_is_left():
    system, states = _trained("srgkp")
    found = system.files["pruning.json"]
    assert json.loads(json.dumps(found)) == found
    lines = "".join(json.dumps([f"{name}.weight", of["order"], of["kept"]], separators=(",", ":"))
                    for name, of in found["layers"].items())
    assert found["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert list(found["layers"]) == ["layer1.0.conv1", "layer1.0.conv2"]
    kernel = states[0].params["backbone"]["layer1_0"]["conv1"]["kernel"]
    for filter_, kept in zip(found["layers"]["layer1.0.conv1"]["order"], found["layers"]["layer1.0.conv1"]["kept"]):
        assert np.flatnonzero(kernel[..., filter_].any((0, 1))).tolist() == kept  # as many groups as filters
    masks = tree.named_leaves(states[0].masks["backbone"])
    assert list(found["weights"]) == [dotted(spec.path) for spec in _base()[0].layers if len(spec.kernel) in (2, 4)]
    for name, leaf in tree.named_leaves(states[0].params["backbone"]).items():
        if name.endswith("/kernel"):
            left = np.count_nonzero(np.broadcast_to(masks[name], leaf.shape)) if name in masks else leaf.size
            assert found["weights"][dotted(name.removesuffix("/kernel"))] == [left, leaf.size]
    costs = _base()[0].costs(states[0].masks)
    assert found["macs"] == {"before": _base()[0].costs()["total"], "after": costs["total"]}
    assert found["params"] == {"before": tree.size(_base()[1]["params"]), "after": costs["params"]}
    assert f"{found['macs']['after']:,}" in system.describe


def test_scores_are_made_of_clean_or_attacked_images():
    net, variables = _base()
    config = _config("system.method=taylor_channels", "system.images=8", "system.loss=madry", "attack.eps=0.3",
                     "train.attack=pgd(num_steps=2)")
    (clean, y), (attacked, same) = (prune.score_images(config, net, DATA, variables, on)
                                    for on in ("clean", "attacked"))
    np.testing.assert_allclose(clean, DATA.train.images[:8] / 255, atol=1e-6)
    assert y.tolist() == same.tolist() and 0.01 < np.abs(clean - attacked).max() <= 0.3 + 1e-6


def test_experts_are_pruned_in_their_own_windows():
    config = _config("model.num_experts=2", "model.model_scale=0.5", "model.router_width=4", "model.width=16")
    net = network.make(config.model, SHAPE, CLASSES)
    variables = jax.device_get(jax.jit(net.init)(jax.random.key(0)))
    found = {}
    for method, more in (("srgkp", ()), ("l1norm", ())):
        configs.override_all(config, [f"system.method={method}", *more])
        system = prune.make(config, net, DATA, meshes.make(), {"base": Source(None, config, net, variables, {}, 0)})
        found[method] = jax.device_get(system.init(rng.key(0, "init"))), system
    state, system = found["srgkp"]
    order = system.files["pruning.json"]["layers"]["layer1.0.conv1"]["order"]
    assert sorted(order[:8]) == list(range(8)) and sorted(order[8:]) == list(range(8, 16))
    assert not any(name.startswith("router") for name in tree.named_leaves(state.masks))
    state, _ = found["l1norm"]
    block, masks = state.params["backbone"]["layer1_0"], state.masks["backbone"]["layer1_0"]
    kept = np.broadcast_to(masks["conv1"]["kernel"], block["conv1"]["kernel"].shape).any((0, 1, 2))
    assert np.array_equal(kept[:8], kept[8:]) and 4 <= kept[:8].sum() < 8
    np.testing.assert_array_equal(masks["bn1"]["scale"], kept[:8])
    x = jnp.asarray(DATA.train.images[:8] / 255.0, jnp.float32)
    logits, _ = net.apply(state.variables, x)
    assert np.all(np.isfinite(logits))


@pytest.mark.parametrize("overrides, said", [
    (["init_from="], "system.name=prune needs init_from"),
    (["system.rate=2"], "system.rate is '2'"), (["system.rate=0"], "system.rate is '0': expected more than 0"),
    (["system.images=5"], "system.images is 5, which has no effect here"),
    (["system.method=given", "system.rate=1/2"], "system.rate is '1/2', which has no effect here"),
    (["system.method=nothing"], "unknown system.method 'nothing'"),
    (["system.groups=5"], "layer1_0/conv1: groups is 5: expected a divisor of the layer's 8 filters")])
def test_bad_input_is_said_before_the_first_step(overrides, said):
    with pytest.raises(UserError) as error:
        config = _config(*overrides)
        configs.check(config)
        net, variables = _base()
        prune.make(config, net, DATA, meshes.make(), {"base": Source(None, config, net, variables, {}, 0)})
    assert said in str(error.value)


def test_a_run_to_be_evaluated_needs_no_source():
    config, (net, _) = _config(), _base()
    system = prune.make(config, net, DATA, meshes.make(), {})
    assert not system.files and dataclasses.is_dataclass(system)


def test_choosing_twice_chooses_the_same():
    net, variables = _base()
    subject = pruned.of(lambda variables, x: net.apply(variables, x)[0], variables, net.layers, "1/2")
    first, second = (pruned.choose(subject, "fpgm", None).masks for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
