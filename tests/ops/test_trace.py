"""Traced layers: of a small routed ResNet in full, and of modules that the package does not know."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from advmoe_jax.core import config
from advmoe_jax.core.layer_spec import LayerSpec, consumers
from advmoe_jax.models import layers, network, resnet
from advmoe_jax.ops import trace

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def _by_path(module, x=IMAGES, *args):
    return {spec.path: spec for spec in trace.layers(module, x, *args)}


def _reads(module, x=IMAGES, *args):
    """{path: (inputs, join)}."""
    return {path: (spec.inputs, spec.join) for path, spec in _by_path(module, x, *args).items()}


# Networks of the package.


@functools.cache
def _small(routing):
    """Two blocks of width 8 with two experts, r = 0.5, and routers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.DEPTHS, "6", (1, 1))
        cfg = config.default().model
        cfg.update(dict(name="resnet", depth=6, width=8, num_experts=2, model_scale=0.5, experts="shared",
                        routing=routing, router_width=3))
        return network.make(cfg, (8, 8, 3), 10)


STEM, FIRST, SHORTCUT, SECOND = (f"backbone/{name}" for name in (
    "conv1", "layer1_0/conv2", "layer1_0/shortcut", "layer2_0/conv2"))
STREAM = (SHORTCUT, FIRST)
BACKBONE = (
    LayerSpec(STEM, (3, 3, 3, 8), 8, 1, (8, 8), "backbone/bn1", ()),
    LayerSpec("backbone/layer1_0/conv1", (3, 3, 8, 8), 4, 1, (8, 8), "backbone/layer1_0/bn1", (STEM,), routed=True),
    LayerSpec(FIRST, (3, 3, 4, 8), 4, 1, (8, 8), "backbone/layer1_0/bn2", ("backbone/layer1_0/conv1",), routed=True),
    LayerSpec(SHORTCUT, (1, 1, 8, 4), 4, 1, (8, 8), "backbone/layer1_0/shortcut_bn", (STEM,)),
    LayerSpec("backbone/layer2_0/conv1", (3, 3, 4, 16), 8, 2, (4, 4), "backbone/layer2_0/bn1", STREAM, "add", True),
    LayerSpec(SECOND, (3, 3, 8, 16), 8, 1, (4, 4), "backbone/layer2_0/bn2", ("backbone/layer2_0/conv1",), routed=True),
    LayerSpec("backbone/layer2_0/shortcut", (1, 1, 4, 8), 8, 2, (4, 4), "backbone/layer2_0/shortcut_bn", STREAM, "add"),
    LayerSpec("backbone/linear", (8, 10), 10, 1, (1, 1), None, ("backbone/layer2_0/shortcut", SECOND), "add"))


def _head(path, kernels, inputs, join=""):
    (hidden, scores) = kernels
    return (LayerSpec(f"router/{path}/hidden", hidden, hidden[1], 1, (1, 1), None, inputs, join),
            LayerSpec(f"router/{path}/scores", scores, scores[1], 1, (1, 1), None, (f"router/{path}/hidden",)))


def test_layer_routers_read_what_their_layers_read():
    assert _small("layer").layers == (
        *BACKBONE, *_head("layer0", ((8, 3), (3, 2)), (STEM,)),
        *_head("layer1", ((4, 3), (3, 2)), ("backbone/layer1_0/conv1",)),
        *_head("layer2", ((4, 3), (3, 2)), STREAM, "add"),
        *_head("layer3", ((8, 3), (3, 2)), ("backbone/layer2_0/conv1",)))


def test_a_router_on_the_image_reads_no_layer():
    assert _small("embedding").layers == (
        *BACKBONE, LayerSpec("router/conv1", (3, 3, 3, 3), 3, 2, (4, 4), "router/bn1", ()),
        LayerSpec("router/conv2", (3, 3, 3, 6), 6, 2, (2, 2), "router/bn2", ("router/conv1",)),
        *_head("head", ((6, 12), (12, 8)), ("router/conv2",)))


def test_global_router_with_shortcuts_that_pad_channels():
    net = _small("global")
    assert net.layers[:len(BACKBONE)] == BACKBONE and len(net.layers) == len(BACKBONE) + 20
    router = {spec.path: spec for spec in net.layers[len(BACKBONE):]}
    stream = ("router/conv1", *(f"router/layer1_{i}_conv2" for i in range(3)))
    assert router["router/layer2_0_conv1"] == LayerSpec(
        "router/layer2_0_conv1", (3, 3, 3, 6), 6, 2, (4, 4), "router/layer2_0_bn1", stream, "add")
    assert router["router/fc"] == LayerSpec("router/fc", (12, 2), 2, 1, (1, 1), None, (
        *stream, *(f"router/layer{stage}_{i}_conv2" for stage in (2, 3) for i in range(3))), "add")


def test_a_network_is_traced_once():
    assert _small("layer").layers is _small("layer").layers


def test_consumers():
    assert consumers(_small("layer").layers, STEM) == (
        "backbone/layer1_0/conv1", SHORTCUT, "router/layer0/hidden")


@pytest.mark.parametrize("train", [0, 1, 2])
def test_statistics_of_the_batch_are_no_paths_of_data(train):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = layers.BatchNorm(name="bn1")(layers.Conv(4, name="a")(x), train)
            return layers.Conv(4, name="b")(layers.BatchNorm(name="bn2")(nn.relu(x), train))

    a, b = _by_path(Net(), IMAGES, train).values()
    assert (a.norm, a.inputs, b.norm, b.inputs) == ("bn1", (), None, ("a",))


# Modules that the package does not know.


def test_a_norm_of_any_kind_keeps_channels():
    class Whitening(nn.Module):
        @nn.compact
        def __call__(self, x):
            whiten = self.variable("batch_stats", "whiten", jnp.eye, x.shape[-1])
            return x @ whiten.value * self.param("scale", nn.initializers.ones, (1, 1, 1, x.shape[-1]))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return _conv("b", nn.max_pool(Whitening(name="norm")(_conv("a", x)), (2, 2)))

    a, b = _by_path(Net()).values()
    assert (a.norm, b.inputs, b.norm) == ("norm", ("a",), None)


class Stranger(nn.Module):
    """A skip connection, a grouped convolution, a concatenation and a pool."""

    norm: str | None

    def _normalised(self, x, name):
        kind = {"batch": functools.partial(nn.BatchNorm, use_running_average=False), "layer": nn.LayerNorm,
                "group": functools.partial(nn.GroupNorm, num_groups=2), None: None}[self.norm]
        return kind(name=name)(x) if kind else x

    @nn.compact
    def __call__(self, x):
        stem = nn.gelu(self._normalised(nn.Conv(8, (5, 5), strides=2, padding=2, name="stem")(x), "stem_norm"))
        y = nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(stem)
        y = self._normalised(y, "grouped_norm") + stem
        z = jnp.concatenate([nn.silu(y), nn.Conv(6, (1, 1), name="side")(x[:, ::2, ::2])], axis=-1)
        z = nn.avg_pool(nn.Conv(12, (3, 3), (2, 2), name="mixed")(z), (2, 2))
        return nn.Dense(5, name="head")(z.reshape(len(z), -1))


@pytest.mark.parametrize("norm", [None, "batch", "layer", "group"])
def test_a_module_of_plain_flax(norm):
    def named(path):
        return f"{path}_norm" if norm else None

    assert trace.layers(Stranger(norm), IMAGES) == (
        LayerSpec("stem", (5, 5, 3, 8), 8, 2, (4, 4), named("stem"), ()),
        LayerSpec("grouped", (3, 3, 2, 8), 8, 1, (4, 4), named("grouped"), ("stem",), groups=4),
        LayerSpec("side", (1, 1, 3, 6), 6, 1, (4, 4), None, ()),
        LayerSpec("mixed", (3, 3, 14, 12), 12, 2, (2, 2), None, ("grouped", "stem", "side"), "concat"),
        LayerSpec("head", (12, 5), 5, 1, (1, 1), None, ("mixed",)))
    macs = [spec.macs for spec in trace.layers(Stranger(norm), IMAGES)]
    assert macs == [25 * 3 * 8 * 16, 9 * 2 * 8 * 16, 3 * 6 * 16, 9 * 14 * 12 * 4, 60]


def test_dense_blocks_join_by_concatenation():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), name="stem")(x)
            for i in range(3):
                y = nn.relu(nn.BatchNorm(use_running_average=False, name=f"bn{i}")(x))
                x = jnp.concatenate([x, nn.Conv(2, (3, 3), name=f"conv{i}")(y)], axis=-1)
            return nn.Conv(1, (1, 1), name="transition")(x)

    found = _by_path(Block())
    assert {path: (spec.inputs, spec.join) for path, spec in found.items()} == {
        "stem": ((), ""), "conv0": (("stem",), ""), "conv1": (("stem", "conv0"), "concat"),
        "conv2": (("stem", "conv0", "conv1"), "concat"),
        "transition": (("stem", "conv0", "conv1", "conv2"), "concat")}
    assert found["transition"].kernel[2] == 10 and found["stem"].norm == "bn0"
    assert not any(spec.norm for path, spec in found.items() if path != "stem")  # theirs read a concatenation


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (4, 4), (4, 4), name="patches")(x).reshape(len(x), 4, 6)
        token = self.param("token", nn.initializers.zeros, (1, 1, 6))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 6)), x], axis=1)
        x = x + self.param("positions", nn.initializers.zeros, (1, 5, 6))
        attention = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")
        x = x + attention(nn.LayerNorm(name="ln1")(x))
        y = nn.gelu(nn.Dense(24, name="wide")(nn.LayerNorm(name="ln2")(x)))
        x = x + nn.Dense(6, name="narrow")(y)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="ln3")(x)[:, 0])


def test_attention_and_tokens():
    pairs = 5 * 5 * 6  # each token's query by each key, and so the values
    spread = {f"attention/{name}": LayerSpec(f"attention/{name}", (6, 2, 3), 3, 1, (5, 1), None, ("patches",),
                                             products=products)
              for name, products in (("query", pairs), ("key", 0), ("value", pairs))}
    # Queries and keys weigh tokens; the channels that `out` reads are those of the values.
    assert _by_path(Transformer()) == {
        "patches": LayerSpec("patches", (4, 4, 3, 6), 6, 4, (2, 2), None, ()), **spread,
        "attention/out": LayerSpec("attention/out", (2, 3, 6), 6, 1, (5, 1), None, ("attention/value",)),
        "wide": LayerSpec("wide", (6, 24), 24, 1, (5, 1), None, ("patches", "attention/out"), "add"),
        "narrow": LayerSpec("narrow", (24, 6), 6, 1, (5, 1), None, ("wide",)),
        "head": LayerSpec("head", (6, 3), 3, 1, (1, 1), None, ("patches", "attention/out", "narrow"), "add")}
    assert [spec.macs for spec in _by_path(Transformer()).values()] == [
        16 * 3 * 6 * 4, 180, 180, 180, 180, 720, 720, 18]


def _conv(name, x, features=4):
    return nn.Conv(features, (1, 1), name=name)(x)


def test_gates_join_channels_only_channel_by_channel():
    class Gated(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = _conv("a", x)
            of_channels = nn.sigmoid(nn.Dense(4, name="of_channels")(jnp.mean(a, (1, 2))))
            b = _conv("b", a * of_channels[:, None, None, :])
            of_pixels = nn.sigmoid(_conv("of_pixels", b, 1))
            c = _conv("c", b * of_pixels + of_pixels + jnp.broadcast_to(of_pixels, b.shape))
            experts = nn.softmax(nn.Dense(2, name="experts")(jnp.mean(c, (1, 2))))
            d = c * experts[:, 0, None, None, None] + _conv("d", c) * experts[:, 1, None, None, None]
            return _conv("e", jnp.where(_conv("predicate", d) > 0, d, 0.0))

    assert _reads(Gated()) == {
        "a": ((), ""), "of_channels": (("a",), ""), "b": (("a", "of_channels"), "add"), "of_pixels": (("b",), ""),
        "c": (("b",), ""), "experts": (("c",), ""), "d": (("c",), ""), "predicate": (("c", "d"), "add"),
        "e": (("c", "d"), "add")}


def test_the_image_is_one_of_those_that_join():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.concatenate([x, _conv("a", x)], -1)
            return _conv("c", _conv("b", x) + nn.relu(x[..., :4]))

    assert _reads(Net()) == {"a": ((), ""), "b": (("a",), "concat"), "c": (("b", "a"), "add")}


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit], ids=["remat", "jit"])
def test_layers_inside_of_other_programs(wrap):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.jit(nn.relu)(x + nn.LayerNorm(name="ln")(_conv("conv", x)))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = wrap(Block)(name="block")(_conv("stem", x))
            x = jax.lax.cond(jnp.sum(x) > 0, lambda x: 2 * x, lambda x: jnp.flip(x, 1), x)
            x, _ = jax.lax.scan(lambda x, _: (nn.tanh(x), None), x, length=3)
            return _conv("last", nn.BatchNorm(use_running_average=True, name="bn")(x))

    found = _by_path(Net())
    assert (found["block/conv"].inputs, found["block/conv"].norm) == (("stem",), "block/ln")
    assert (found["last"].inputs, found["last"].join) == (("stem", "block/conv"), "add")


def test_a_layer_called_twice_reads_what_both_calls_read():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.Conv(4, (1, 1), name="shared")
            return shared(_conv("a", x)) + shared(inputs=_conv("b", x))

    assert _reads(Net()) == {"a": ((), ""), "shared": (("a", "b"), "add"), "b": ((), "")}
