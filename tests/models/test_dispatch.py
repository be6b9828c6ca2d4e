"""A network that computes each image's expert alone is the one that computes all and selects: values and gradients.

In float64, since float32 gradients of a network differ in the third digit with the order of sums.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config
from advmoe_jax.core import mesh as meshes
from advmoe_jax.models import network, resnet
from advmoe_jax.ops import dispatch, routing

BATCH, SHAPE, CLASSES = 12, (8, 8, 3), 4
CASES = [  # routing, experts, N, r
    ("layer", "shared", 2, 0.5), ("layer", "shared", 3, 0.8), ("layer", "disjoint", 8, 0.25),
    ("embedding", "shared", 2, 0.25), ("embedding", "disjoint", 3, 0.5),
    ("global", "disjoint", 2, 0.5), ("global", "shared", 8, 0.5), ("global", "disjoint", 3, 0.8)]
QUICK = (CASES[0], CASES[5])
SHALLOW = "6"  # two stages of one block: enough for a stride and a shortcut
GRADS = ("ste_selected", "ste_full", "none", "scaled")


def _name(case):
    return "-".join(map(str, case))


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    monkeypatch.setitem(resnet.DEPTHS, SHALLOW, (1, 1))


@functools.cache
def _net(case, kind, mesh=None):
    routing_name, experts, num_experts, model_scale = case
    cfg = config.default().model
    cfg.update(dict(depth=int(SHALLOW), width=8, routing=routing_name, experts=experts, num_experts=num_experts,
                    dispatch=kind, model_scale=model_scale, router_width=4, expert_init="independent"))
    return network.make(cfg, SHAPE, CLASSES, mesh)


@functools.cache
def _inputs(case, train=False, batch=BATCH):
    """Variables in float64 with scores that spread over the experts, images, cotangents of logits and of scores."""
    numbers = np.random.default_rng(0)
    with jax.enable_x64(False):
        variables = jax.eval_shape(_net(case, "all").init, jax.random.key(0))
    variables = jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape) * min(1, np.sqrt(
        2 / max(np.prod(leaf.shape[:-1]), 1))), variables)
    variables["batch_stats"] = jax.tree.map(lambda leaf: 1 + leaf**2, variables["batch_stats"])
    x = numbers.uniform(0, 1, (batch, *SHAPE))
    if case[0] == "global":  # centre its scores, or all images take one expert
        net = _net(case, "all")
        scores = (net.apply_train if train else net.apply)(variables, x)[1]["router_logits"][:, 0]
        variables["params"]["router"]["fc"]["bias"] -= np.asarray(scores.mean(0))
    return variables, x, numbers.standard_normal((batch, CLASSES))


def _run(net, case, grad, train, detach=False, batch=BATCH):
    """Logits, choices, statistics, and gradients to parameters and images of a sum over all outputs."""
    variables, x, cotangent = _inputs(case, train, batch)
    route = routing.hard(grad, detach)
    if net.module.dispatch.mesh is not None:
        x, cotangent = (jax.device_put(a, meshes.by_example(net.module.dispatch.mesh)) for a in (x, cotangent))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        used = {"params": params, "batch_stats": variables["batch_stats"]}
        stats = {}
        if train:
            logits, aux, stats = net.apply_train(used, x, route)
        else:
            logits, aux = net.apply(used, x, route)
        return jnp.sum(cotangent * logits) + jnp.sum(aux["router_logits"]**2), (logits, aux, stats)

    (_, outputs), grads = run(variables["params"], x)
    return jax.device_get((outputs, grads))


def _assert_equal(ours, theirs):
    (logits, aux, stats), grads = ours
    np.testing.assert_array_equal(aux["expert_ids"], theirs[0][1]["expert_ids"])
    for a, b in zip(jax.tree.leaves((logits, aux, stats, grads)), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * max(1, np.abs(b).max()))


@functools.cache
def _forward(case, kind):
    return jax.jit(_net(case, kind).apply)


@pytest.mark.parametrize("case, grads, train", [
    pytest.param(QUICK[0], GRADS[:1], True, id=f"{_name(QUICK[0])}-train"),
    *(pytest.param(case, GRADS, train, id=f"{_name(case)}-all-{'train' if train else 'eval'}", marks=pytest.mark.slow)
      for case in CASES for train in (False, True))])
def test_blocks_are_exact(case, grads, train):
    with jax.enable_x64(True):
        for grad in grads:
            theirs = _run(_net(case, "all"), case, grad, train)
            ids = theirs[0][1]["expert_ids"]
            assert len(np.unique(ids)) > 1, "more than one expert is used"
            _assert_equal(_run(_net(case, "blocks"), case, grad, train), theirs)


@pytest.mark.parametrize("case, kind, devices", [
    (QUICK[0], "blocks", 4), pytest.param(QUICK[0], "blocks", 1, marks=pytest.mark.slow),
    pytest.param(QUICK[1], "blocks", 4, marks=pytest.mark.slow),
    pytest.param(CASES[3], "all", 1, marks=pytest.mark.slow)], ids=str)
def test_passes_in_one_batch_are_those_one_after_the_other(case, kind, devices):
    mesh = meshes.make() if devices == 4 else None
    net, every = _net(case, kind, mesh), _net(case, "all")

    def one_by_one(variables, x, cotangent, route):
        found, stats = [], variables["batch_stats"]
        for images in x.swapaxes(0, 1):
            *outputs, stats = every.apply_train({"params": variables["params"], "batch_stats": stats}, images, route)
            found.append(outputs)
        logits, aux = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *found)
        return jnp.sum(cotangent * logits), (logits, aux, stats)

    def at_once(variables, x, cotangent, route):
        logits, aux, stats = net.apply_train(variables, x, route)
        return jnp.sum(cotangent * logits), (logits, aux, stats)

    with jax.enable_x64(True):
        variables, x, cotangent = _inputs(case, True)
        x, cotangent = jnp.stack([x, 1 - x], 1), jnp.stack([cotangent, cotangent[::-1]], 1)
        cut = meshes.by_example(mesh) if mesh else None
        ours, theirs = (jax.device_get(jax.jit(jax.value_and_grad(f, has_aux=True))(
            variables, *jax.device_put((x, cotangent), where), routing.hard("ste_full", detach=True)))
            for f, where in ((at_once, cut), (one_by_one, None)))
    np.testing.assert_array_equal(ours[0][1][1]["expert_ids"], theirs[0][1][1]["expert_ids"])
    for a, b in zip(*(jax.tree.leaves((value, grads["params"])) for value, grads in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("case, batch, devices", [
    pytest.param(CASES[3], 13, 1, id="one", marks=pytest.mark.slow), pytest.param(CASES[0], 20, 4, id="four"),
    pytest.param(CASES[2], 13, 1, id="eight-experts", marks=pytest.mark.slow),
    pytest.param(CASES[5], 20, 4, id="global-four", marks=pytest.mark.slow)])
def test_fillers_and_empty_blocks(case, batch, devices, monkeypatch):
    """Blocks of 4 that no expert fills, of a batch that they do not divide."""
    monkeypatch.setattr(dispatch, "block_size", lambda *_: 4)
    mesh = meshes.make() if devices == 4 else None
    with jax.enable_x64(True):
        ours, theirs = (_run(_net(case, kind, on), case, "ste_full", True, devices == 4, batch)
                        for kind, on in (("blocks", mesh), ("all", None)))
    _assert_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK, ids=_name)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_four_devices_plan_their_own_images(case, train):
    mesh = meshes.make()
    assert mesh.size == 4
    with jax.enable_x64(True):
        for grad in GRADS[1:2] if train else GRADS[:1]:
            _assert_equal(_run(_net(case, "blocks", mesh), case, grad, train, detach=train),
                          _run(_net(case, "all"), case, grad, train, detach=train))


@pytest.mark.parametrize("case", [QUICK[0], pytest.param(QUICK[1], marks=pytest.mark.slow)], ids=_name)
def test_fixed_and_soft_routes(case):
    variables, x, _ = _inputs(case)
    experts, layers = case[2], 1 if case[0] == "global" else 4
    ids = np.random.default_rng(1).integers(0, experts, (BATCH, layers)).astype(np.int32)
    with jax.enable_x64(True):
        for route in (routing.fixed(ids), routing.fixed(ids[:, 0]), routing.soft(0.5), routing.fixed(0 * ids)):
            ours, theirs = (_forward(case, kind)(variables, jnp.asarray(x), route) for kind in ("blocks", "all"))
            np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_whole_pathways():
    variables, x, _ = _inputs(QUICK[1])
    with jax.enable_x64(True):
        ours, theirs = (_forward(QUICK[1], kind)(variables, jnp.asarray(x)) for kind in ("blocks", "all"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert len(np.unique(theirs[1]["expert_ids"])) == 2


@pytest.mark.slow
def test_the_host_sorts_what_is_not_traced():
    variables, x, _ = _inputs(QUICK[1])
    x = np.resize(x, (33, *SHAPE))
    with jax.enable_x64(True):
        ours = _net(QUICK[1], "host").apply(variables, jnp.asarray(x))
        traced, theirs = (_forward(QUICK[1], kind)(variables, jnp.asarray(x)) for kind in ("host", "all"))
        fixed = [net(variables, jnp.asarray(x), routing.fixed(np.full(33, 1, np.int32)))[0] for net in (
            _net(QUICK[1], "host").apply, _forward(QUICK[1], "all"))]
    for found in (ours, traced):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(*fixed, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_one_launch_a_layer():
    """`grouped`, in the interpreter."""
    case = CASES[3]
    with jax.enable_x64(True):
        _assert_equal(*(_run(_net(case, kind), case, "ste_full", train=False) for kind in ("grouped", "all")))


@pytest.mark.parametrize("batch", [1, 7, 65])
def test_any_batch_size(batch):
    case = CASES[0]
    variables, x, _ = _inputs(case)
    x = np.resize(x, (batch, *SHAPE))
    with jax.enable_x64(True):
        ours, theirs = (_forward(case, kind)(variables, jnp.asarray(x))[0] for kind in ("blocks", "all"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_what_auto_is():
    assert [dispatch.pick("auto", *case, "cpu") for case in (
        (1, True, 64), (2, True, 16), (2, False, 16), (2, False, 64), (1.25, False, 64), (4, False, 16))
            ] == ["all", "blocks", "all", "blocks", "all", "blocks"]
    assert dispatch.pick("auto", 8, True, 64, "gpu") == dispatch.pick("auto", 8, False, 64, "tpu") == "all"
    assert dispatch.pick("grouped", 1, False, 64, "cpu") == "grouped"


@pytest.mark.parametrize("case, kind", [
    (("layer", "shared", 2, 0.25), "all"), (("layer", "shared", 8, 0.5), "all"),
    (("layer", "disjoint", 8, 0.5), "blocks"), (("layer", "shared", 8, 0.25), "blocks"),
    (("global", "shared", 2, 0.5), "blocks")])
def test_auto_counts_the_channels_that_all_experts_have_together(case, kind):
    """Overlapping windows are computed once: 8 experts of half the channels cost twice one of them, not eight times."""
    assert _net(case, "auto").module.dispatch.kind == kind


def test_block_size():
    assert [dispatch.block_size(b, e) for b, e in ((64, 2), (128, 2), (128, 4), (32, 8), (8, 16), (1, 2))] == [
        8, 16, 16, 4, 1, 1]


