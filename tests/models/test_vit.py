"""Vision transformers: what they cost, what their tokens choose, and what experts of several layers give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import model as models
from advmoe_jax.models import network, routing_facts
from advmoe_jax.models.layers import Experts
from advmoe_jax.models.tokens import Mlp, RoutedDense
from advmoe_jax.ops import dispatch, routing
from advmoe_jax.ops.dispatch import Choice, Dispatch

SHAPE, CLASSES, BATCH = (8, 8, 3), 4, 6
TOKENS, CHANNELS, HIDDEN, EXPERTS, LAYERS = 5, 8, 32, 3, 2
GRADS = {"all": routing.ROUTER_GRADS, "blocks": ("none", "ste_selected")}  # "ste_full" computes all experts anyway


def _cfg(**fields):
    cfg = configs.default(model="vit").model
    cfg.update(dict(width=CHANNELS, heads=2, depth=LAYERS, patch=4, moe_every=1, num_experts=EXPERTS, model_scale=1.0,
                    dispatch="all") | fields)
    return cfg


@functools.cache
def _net(mesh=None, **fields):
    return network.make(_cfg(**fields), SHAPE, CLASSES, mesh)


def _random(shapes, seed=0):
    """Numbers of which scores spread over the experts."""
    numbers = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape).astype(np.float32) / np.sqrt(
        np.prod(leaf.shape[:-1])), shapes)


def _images(batch=BATCH):
    return np.random.default_rng(1).uniform(0, 1, (batch, *SHAPE)).astype(np.float32)


def _ids():
    return np.random.default_rng(2).integers(0, EXPERTS, (BATCH, LAYERS * TOKENS)).astype(np.int32)


def test_deit_tiny():
    """As timm counts its parameters; 197 tokens, 12 blocks, and in each two products of 197 x 197 x 192."""
    cfg = configs.default(model="vit").model
    cfg.update(num_experts=1, model_scale=1.0)
    net = network.make(cfg, (224, 224, 3), 1000)
    linear = 196 * 768 * 192 + 12 * 197 * 12 * 192**2 + 192 * 1000
    assert linear + 12 * 2 * 197**2 * 192 == 1_253_683_200
    assert net.costs() == dict(pathway=1_253_683_200, router=0, total=1_253_683_200, executed=1_253_683_200,
                               params=5_717_416)


@pytest.mark.parametrize("kind, computed", [("all", EXPERTS), ("blocks", 1)])
def test_costs_of_experts_by_hand(kind, computed):
    mlp = 2 * CHANNELS * HIDDEN * TOKENS
    attention = 4 * CHANNELS**2 * TOKENS + 2 * TOKENS**2 * CHANNELS
    pathway = 48 * CHANNELS * (TOKENS - 1) + 2 * (attention + mlp) + CHANNELS * CLASSES
    router = CHANNELS * EXPERTS * TOKENS
    found = _net(moe_every=2, dispatch=kind).costs()
    assert {name: found[name] for name in ("pathway", "router", "total", "executed")} == dict(
        pathway=pathway, router=router, total=pathway + router, executed=pathway + router + (computed - 1) * mlp)
    dense = _net(moe_every=2, num_experts=1).costs()
    of_mlp = 2 * CHANNELS * HIDDEN + HIDDEN + CHANNELS
    assert found["params"] - dense["params"] == (EXPERTS - 1) * of_mlp + CHANNELS * EXPERTS


def test_there_are_no_statistics():
    assert not tree.named_leaves(_net().shapes["batch_stats"])
    assert {spec.norm for spec in _net().layers} == {None}


@pytest.mark.parametrize("moe_every, routed", [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2])])
def test_which_blocks_have_experts(moe_every, routed):
    net = _net(depth=4, moe_every=moe_every)
    assert [spec.path for spec in net.layers if spec.routed] == [
        f"backbone/blocks_{i}/mlp/{name}" for i in routed for name in ("fc1", "fc2")]


# What tokens choose.


def test_tokens_take_given_routes():
    """Each image of a batch alone, on its own route, gives the same."""
    variables, x, ids = _random(_net().shapes), _images(), _ids()
    together = jax.jit(_net(dispatch="blocks").apply)
    alone = jax.jit(_net().apply)
    logits, aux = together(variables, x, routing.fixed(ids))
    np.testing.assert_array_equal(aux["expert_ids"], ids)
    for b in range(BATCH):
        one, _ = alone(variables, x[b:b + 1], routing.fixed(ids[b:b + 1]))
        np.testing.assert_allclose(logits[b:b + 1], one, rtol=1e-4, atol=1e-5)
    everywhere, _ = together(variables, x, routing.fixed(np.broadcast_to(ids[:, :1], ids.shape)))
    np.testing.assert_allclose(together(variables, x, routing.fixed(ids[:, 0]))[0], everywhere, rtol=1e-5)
    assert np.abs(everywhere - logits).max() > 0.1


def test_tokens_take_the_largest_score_in_any_order_of_the_images():
    net, x = _net(dispatch="blocks"), _images()
    variables, evaluate = _random(net.shapes), jax.jit(net.apply)
    logits, aux = evaluate(variables, x)
    assert aux["router_logits"].shape == (BATCH, LAYERS * TOKENS, EXPERTS)
    np.testing.assert_array_equal(aux["expert_ids"], np.argmax(aux["router_logits"], -1))
    ranked = np.sort(aux["router_logits"], -1)
    np.testing.assert_array_equal(aux["margins"], ranked[..., -1] - ranked[..., -2])
    assert all(len(np.unique(row)) > 1 for row in aux["expert_ids"]), "tokens of an image go apart"
    order = np.array([3, 0, 5, 1, 4, 2])
    shuffled, other = evaluate(variables, x[order])
    np.testing.assert_allclose(shuffled, logits[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(other["expert_ids"], aux["expert_ids"][order])


@pytest.mark.parametrize("model_scale", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_an_expert_is_the_small_dense_network(model_scale):
    """Where the router has no preference, each of E experts weighs 1 / E."""
    net, dense = _net(model_scale=model_scale), _net(model_scale=model_scale, num_experts=1)
    assert (net.kind, dense.kind) == ("MoE", "Dense" if model_scale == 1 else "S-Dense")
    assert net.costs()["pathway"] == dense.costs()["pathway"]
    variables, x, expert = _random(net.shapes), _images(), 1
    variables["params"]["router"] = jax.tree.map(jnp.zeros_like, variables["params"]["router"])
    shapes = tree.named_leaves(dense.shapes["params"]["backbone"])

    def of_expert(path, leaf):
        name = "/".join(part.key for part in path)
        width = shapes[name].shape[-1]
        own = leaf[..., expert * width:(expert + 1) * width] if leaf.shape != shapes[name].shape else leaf
        return own / EXPERTS if "fc2" in name else own

    single = jax.tree_util.tree_map_with_path(of_expert, variables["params"]["backbone"])
    mixed, _ = jax.jit(net.apply)(variables, x, routing.fixed(np.full(BATCH, expert, np.int32)))
    alone, aux = jax.jit(dense.apply)({"params": {"backbone": single}, "batch_stats": {}}, x)
    assert aux == {}
    np.testing.assert_allclose(mixed, alone, rtol=1e-4, atol=1e-5)


def test_experts_start_equal_unless_told_otherwise():
    ones = jnp.ones((BATCH, EXPERTS))
    for expert_init, equal in (("equal", True), ("independent", False)):
        layer = RoutedDense(HIDDEN, EXPERTS, expert_init)
        params = layer.init(jax.random.key(0), jnp.zeros((BATCH, TOKENS, 64)), Choice(ones, expert=jnp.int32(0)))
        first, *others = np.split(np.asarray(params["params"]["kernel"]), EXPERTS, -1)
        assert 0.015 < first.std() < 0.025 and all(np.array_equal(first, other) == equal for other in others)


# What a layer computes, in float64.


@functools.cache
def _layer(kind):
    """{gradient: value, and gradients of <value, g> to parameters, tokens and scores}."""
    mlp = Mlp(HIDDEN, Experts(EXPERTS, 1.0, "disjoint", "independent"), is_routed=True)

    def give(params, x, scores, route):
        return mlp.apply({"params": params}, x, lambda _: dispatch.choose(scores, route, 0, Dispatch(kind))[0])

    @jax.jit
    def run(params, x, scores, g):
        def of(grad):
            return jax.value_and_grad(lambda *a: (y := give(*a, routing.hard(grad)), jnp.sum(y * g))[::-1],
                                      (0, 1, 2), has_aux=True)(params, x, scores)

        return {grad: of(grad) for grad in GRADS[kind]} | {
            f"soft {t}": give(params, x, scores, routing.soft(t)) for t in ((1e-4, 1.0) if kind == "all" else ())}

    with jax.enable_x64(True):
        return jax.device_get(run(*_inputs()))


@functools.cache
def _inputs():
    """Parameters of an MLP of experts, tokens (B, T, C), scores (B, T, E) and cotangents (B, T, C)."""
    numbers = np.random.default_rng(3)
    shapes = {"fc1": (CHANNELS, EXPERTS * HIDDEN), "fc2": (HIDDEN, EXPERTS * CHANNELS)}
    params = {name: {"kernel": numbers.standard_normal(shape) / np.sqrt(shape[0]),
                     "bias": numbers.standard_normal(shape[1])} for name, shape in shapes.items()}
    return params, *(numbers.standard_normal((BATCH, TOKENS, last)) for last in (CHANNELS, EXPERTS, CHANNELS))


def _outputs():
    """(E, B, T, C) of every expert."""
    params, x, *_ = _inputs()

    def linear(x, name, width, e):
        own = slice(e * width, (e + 1) * width)
        return x @ params[name]["kernel"][:, own] + params[name]["bias"][own]

    with jax.enable_x64(True):
        return np.stack([linear(np.asarray(jax.nn.gelu(linear(x, "fc1", HIDDEN, e), approximate=False)), "fc2",
                                CHANNELS, e) for e in range(EXPERTS)])


def _shares():
    e = np.exp(_inputs()[2])
    return e / e.sum(-1, keepdims=True)


def test_an_output_has_the_share_of_its_expert_as_a_factor():
    scores, y, p = _inputs()[2], _outputs(), _shares()
    taken = np.eye(EXPERTS)[scores.argmax(-1)]
    for kind, grads in GRADS.items():
        for grad in grads:
            (_, value), _ = _layer(kind)[grad]
            np.testing.assert_allclose(value, np.einsum("bte,bte,ebtc->btc", taken, p, y), rtol=1e-10, atol=1e-10)
    for temperature, weights in ((1e-4, taken), (1.0, p)):
        np.testing.assert_allclose(_layer("all")[f"soft {temperature}"], np.einsum(
            "bte,bte,ebtc->btc", weights, p, y), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", routing.ROUTER_GRADS)
def test_gradients_of_scores(grad):
    """That of the share, and to it the straight-through one of experts whose outputs have their shares as factors."""
    *_, scores, g = _inputs()
    p, taken = _shares(), np.eye(EXPERTS)[scores.argmax(-1)]
    products = p * np.einsum("btc,ebtc->bte", g, _outputs())
    own = taken * products
    share = own - own.sum(-1, keepdims=True) * p
    expected = share + {"none": 0, "ste_full": products, "ste_selected": own, "scaled": share}[grad]
    for kind in (kind for kind, grads in GRADS.items() if grad in grads):
        np.testing.assert_allclose(_layer(kind)[grad][1][2], expected, rtol=1e-9, atol=1e-9)


def test_all_experts_and_blocks_have_the_same_gradients():
    for grad in GRADS["blocks"]:
        every, blocks = (_layer(kind)[grad][1] for kind in GRADS)
        for a, b in zip(jax.tree.leaves(every), jax.tree.leaves(blocks), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind, routed, devices", [
    ("blocks", "layer", 4), ("grouped", "layer", 1), ("blocks", "embedding", 1), ("blocks", "global", 1),
    ("host", "global", 1)])
def test_networks_compute_the_same_however(kind, routed, devices):
    """In float64, in evaluation, with the gradients to parameters and images."""
    mesh = meshes.make() if devices > 1 else None
    net, every = _net(dispatch=kind, routing=routed, mesh=mesh), _net(routing=routed)
    x, g = _images(8).astype(np.float64), np.random.default_rng(4).standard_normal((8, CLASSES))
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), _random(net.shapes))
    variables["batch_stats"] = jax.tree.map(lambda leaf: 1 + leaf**2, variables["batch_stats"])

    def run(net, variables, x, g, grad):
        def loss(params, x):
            logits, aux = net.apply({**variables, "params": params}, x, routing.hard(grad))
            return jnp.sum(logits * g) + jnp.sum(aux["router_logits"]**2), (logits, aux)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    with jax.enable_x64(True):
        for grad in ("none", "ste_full"):
            place = meshes.by_example(mesh) if mesh else None
            ours = jax.jit(functools.partial(run, net), static_argnums=3)(
                variables, *jax.device_put((x, g), place), grad)
            theirs = jax.jit(functools.partial(run, every), static_argnums=3)(variables, x, g, grad)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * max(1, np.abs(b).max()))
        if kind == "host":
            np.testing.assert_allclose(net.apply(variables, jnp.asarray(x))[0], every.apply(variables, x)[0], rtol=1e-9)


# What is said of it.


def test_facts_count_the_tokens_of_a_layer():
    clean, attacked = _ids(), np.roll(_ids(), 1, 0)
    among = np.arange(BATCH) % 2 == 0
    found = _net().facts(np.zeros(BATCH), {"experts": clean}, {"experts": attacked}, among)
    by_layer = clean.reshape(BATCH, LAYERS, TOKENS)
    np.testing.assert_allclose(found["load"], [[np.mean(by_layer[:, layer] == e) for e in range(EXPERTS)]
                                               for layer in range(LAYERS)], rtol=1e-6)
    changed = (by_layer != attacked.reshape(by_layer.shape))[among]
    np.testing.assert_allclose(found["flip_rate"], changed.mean((0, 2)))
    metrics = _net().metrics({"clean": (None, {"expert_ids": jnp.asarray(clean)}),
                              "adv": (None, {"expert_ids": jnp.asarray(attacked)})})
    np.testing.assert_allclose(metrics["load"], found["load"], rtol=1e-6)
    changed = (clean != attacked).reshape(by_layer.shape)
    np.testing.assert_allclose(metrics["flip_rate"], changed.mean((0, 2)), rtol=1e-6)
    [table] = _net().fact_tables(found)
    assert len(table.rows) == LAYERS and routing_facts.progress(metrics).startswith("expert load ")


@pytest.mark.parametrize("fields, message", [
    (dict(patch=3), "model.patch is 3, which does not divide images of 8x8 pixels: expected a divisor, such as 2"),
    (dict(patch=16), "such as 8"),
    (dict(heads=3), "model.width is 8: expected a multiple of the 3 heads \\(model.heads\\), such as 9"),
    (dict(moe_every=3), "model.moe_every is 3: expected at most model.depth, 2, or no block has experts")])
def test_what_does_not_fit(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        models.make(_cfg(**fields), SHAPE, CLASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides, message", [
    (("model.experts=shared",), "model.experts 'shared': expected .*disjoint"),
    (("model.router_width=8",), "model.router_width is 8, which has no effect here: it is for model.routing=embedding"),
    (("system.name=standard", "model.num_experts=1", "model.moe_every=3"), "model.moe_every is 3, which has no effect"),
    (("model.heads=5",), "model.width is 192: expected a multiple of the 5 heads")])
def test_configs_that_are_refused(overrides, message):
    config = configs.default(model="vit")
    with pytest.raises(UserError, match=message):
        configs.override_all(config, overrides)
        configs.check(config)
