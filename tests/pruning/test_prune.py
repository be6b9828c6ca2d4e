"""Methods of pruning, on a network that the package never saw: with a skip connection and a grouped convolution."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from advmoe_jax import pruning
from advmoe_jax.core import config as configs
from advmoe_jax.core import find, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import block_convs
from advmoe_jax.models import network
from advmoe_jax.ops import masks as masking
from advmoe_jax.ops import trace
from advmoe_jax.pruning import about, channels, lrf_scores, pruned, tmi_greedy

METHODS = tuple(name for name in find.names(*pruned.ROOM) if name != "given")
FILTERS = tuple(name for name in METHODS if name in find.names("pruning", "scores"))
RATE = "1/2"
each = pytest.mark.parametrize("method", METHODS)


class _Foreign(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)))
        y = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(16, (3, 3), name="inner")(x)))
        x = nn.relu(x + nn.Conv(8, (3, 3), name="outer")(y))
        y = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3), strides=2, name="strided")(x)))
        y = nn.relu(nn.Conv(16, (3, 3), feature_group_count=4, name="grouped")(y))
        x = y + nn.Conv(16, (1, 1), strides=2, name="projection")(x)
        return nn.Dense(5, name="head")(nn.relu(x).mean((1, 2)))


@functools.cache
def _foreign():
    """The function, its variables, and images with labels."""
    module, x = _Foreign(), jax.random.uniform(jax.random.key(1), (12, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
                             variables)
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    return jax.jit(module.apply), variables, (x, jnp.arange(12) % 5)


@functools.cache
def _pruned(method, rate=RATE, **settings):
    apply, variables, example = _foreign()
    own = getattr(importlib.import_module(f"advmoe_jax.pruning.{method}"), "Config", None)
    if own and "groups" in own.__dataclass_fields__:
        settings["groups"] = 4
    if own and "scope" in own.__dataclass_fields__:  # of all layers together another share of the cost would go
        settings.setdefault("scope", "layer")
    return pruning.prune(apply, variables, example, method=method, rate=rate, **settings)


@functools.cache
def _layers():
    return {spec.path: spec for spec in trace.layers(_Foreign(), jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))}


@each
def test_every_method_says_what_it_is(method):
    module = importlib.import_module(f"advmoe_jax.pruning.{method}")
    assert isinstance(module.ABOUT, about.About) and module.ABOUT.when in about.WHEN
    assert module.ABOUT.title and (not module.ABOUT.venue or module.ABOUT.venue.split()[-1] in module.__doc__)
    assert set(module.ABOUT.reads) <= {"gradients", "features"}


@each
def test_every_method_meets_the_budget(method):
    found, specs = _pruned(method), _layers().values()
    inner = sum(spec.macs for spec in block_convs(tuple(specs)))
    assert found.macs[0] == sum(spec.macs for spec in specs)
    assert found.macs[1] <= found.macs[0] - inner / 2
    assert found.macs[1] >= found.macs[0] - inner * 0.6, "no more goes than has to"
    assert found.params[1] < found.params[0] == tree.size(_foreign()[1]["params"])
    masking.check(_foreign()[1]["params"], found.masks)
    for path, mask in tree.named_leaves(found.masks).items():
        leaf = tree.named_leaves(found.variables["params"])[path]
        assert mask.dtype == bool and not np.any(np.asarray(leaf)[~np.broadcast_to(mask, leaf.shape)]), path


@pytest.mark.parametrize("model, coupled, found", [
    ("wide_resnet", False, ["conv1", "layer1_0/conv1", "layer2_0/conv1"]),
    ("wide_resnet", True, ["conv1", "layer1_0/conv1", "layer1_0/conv2 layer1_0/shortcut", "layer2_0/conv1",
                           "layer2_0/conv2 layer2_0/shortcut"]),
    ("densenet", True, ["block1_0/conv1", "block2_0/conv1"])])
def test_channels_of_networks_whose_norms_come_first(model, coupled, found, monkeypatch):
    """Those inside of blocks, of the stem where it is not added, and those that shortcuts add; none that dense blocks
    concatenate."""
    monkeypatch.setattr(importlib.import_module(f"advmoe_jax.models.{model}"), "_STAGES", 2)
    cfg = configs.default(model=model).model
    cfg.update(dict(num_experts=1, model_scale=1.0, depth=10))
    groups = channels.removable(network.make(cfg, (8, 8, 3), 4).layers, coupled)
    assert [" ".join(spec.path.removeprefix("backbone/") for spec in group.writers) for group in groups] == found


@pytest.mark.parametrize("method", FILTERS)
def test_a_removed_channel_is_gone_whole(method):
    """Nothing that it would feed matters: its norm and bias are zero as well, and its readers' weights masked."""
    found, (apply, variables, (x, _)) = _pruned(method), _foreign()
    for writer, reader in ("inner", "outer"), ("strided", "grouped"):
        gone = np.setdiff1d(np.arange(16), found.plan[writer]["kept"])
        assert 0 < len(gone) < 16
        params = found.variables["params"]
        assert not np.any(params[writer]["kernel"][..., gone]) and not np.any(params[writer]["bias"][gone])
        kernel = np.array(params[reader]["kernel"])
        for channel in gone:
            if reader == "outer":
                assert not kernel[:, :, channel].any()
                kernel[:, :, channel] = 7
            else:
                within = np.s_[:, :, channel % 4, 4 * (channel // 4):4 * (channel // 4) + 4]
                assert not kernel[within].any()
                kernel[within] = 7
        changed = {**found.variables, "params": {**params, reader: {**params[reader], "kernel": kernel}}}
        np.testing.assert_array_equal(apply(changed, x), apply(found.variables, x))
    assert not np.allclose(apply(variables, x), apply(found.variables, x))


def _rows(name):
    kernel = np.asarray(_foreign()[1]["params"][name]["kernel"], np.float64)
    return kernel.reshape(-1, kernel.shape[-1]).T


def _kept(scores):
    """What is kept by scores of 16 channels, by hand."""
    count = len(_pruned("l1norm").plan["inner"]["kept"])
    return sorted(sorted(range(16), key=lambda i: (-scores[i], i))[:count])


def test_scores_are_those_of_the_papers():
    rows = _rows("inner")
    assert _pruned("l1norm").plan["inner"]["kept"] == _kept([np.abs(row).sum() for row in rows])
    assert _pruned("sfp").plan["inner"]["kept"] == _kept([np.sqrt(np.square(row).sum()) for row in rows])
    assert _pruned("fpgm").plan["inner"]["kept"] == _kept(
        [sum(np.linalg.norm(row - other) for other in rows) for row in rows])
    params = _foreign()[1]["params"]
    readers = np.square(np.asarray(params["outer"]["kernel"], np.float64)).sum((0, 1, 3))
    assert _pruned("depgraph").plan["inner"]["kept"] == _kept(
        np.square(rows).sum(1) + np.square(np.asarray(params["norm"]["scale"], np.float64)) + readers)


def test_scores_that_read_images():
    apply, variables, (x, y) = _foreign()

    def loss(kernel):
        params = variables["params"] | {"outer": variables["params"]["outer"] | {"kernel": kernel}}
        logits = apply({**variables, "params": params}, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(12), y])

    kernel = variables["params"]["outer"]["kernel"]
    assert _pruned("taylor_channels").plan["inner"]["kept"] == _kept(
        np.square(jax.grad(loss)(kernel) * kernel).sum((0, 1, 3)))
    inner = _Foreign().apply(variables, x, capture_intermediates=lambda module, _: module.name == "norm")[1]
    maps = np.maximum(inner["intermediates"]["norm"]["__call__"][0], 0)
    ranks = [np.mean([np.linalg.matrix_rank(image[..., channel]) for image in maps]) for channel in range(16)]
    assert _pruned("hrank_scores").plan["inner"]["kept"] == _kept(ranks)


def test_linearly_replaceable_filters_go_first():
    numbers = np.random.default_rng(0)
    rows = numbers.normal(size=(6, 9))
    rows[4] = 2 * rows[0] - rows[1]
    rows[2] *= 0.01
    turns = lrf_scores._turns(rows)
    residual = [np.linalg.norm(row - others.T @ np.linalg.lstsq(others.T, row, rcond=None)[0]) for row, others in (
        (rows[i], np.delete(rows, i, 0)) for i in range(6))]
    assert set(np.flatnonzero(np.isclose(residual, 0, atol=1e-6))) == {0, 1, 4}
    assert np.argsort(turns)[0] in (0, 1, 4) and np.argsort(turns)[1] == 2


def test_a_group_keeps_the_channels_that_are_far_apart():
    """By brute force over what greedy selections from every start give, the nearest channel counting alone."""
    vectors = np.random.default_rng(0).normal(size=(7, 4))
    similarity = 1 - np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    ends = []
    for start in range(7):
        kept = [start]
        while len(kept) < 4:
            kept.append(min((j for j in range(7) if j not in kept), key=lambda j: sum(similarity[i, j] for i in kept)))
        inner = sum(similarity[a, b] for a in kept for b in kept if a < b)
        outer = sum(max(similarity[j, i] for i in kept) for j in range(7) if j not in kept)
        ends.append((inner - 6 / 3 * outer, tuple(sorted(kept))))
    assert tmi_greedy._greedy(vectors, 4) == min(ends)[1]


def test_kmeans_groups_have_equal_sizes_and_find_what_is_apart():
    numbers = np.random.default_rng(0)
    rows = np.repeat(np.eye(4, 9) * 10, 3, 0) + numbers.normal(size=(12, 9)) * 0.1
    shuffled = numbers.permutation(12)
    labels = tmi_greedy._labels(rows[shuffled], 4, "kmeans", numbers)
    assert np.bincount(labels).tolist() == [3] * 4
    assert len({(label, of // 3) for label, of in zip(labels, shuffled)}) == 4


def test_channels_that_shortcuts_add_go_together_or_not_at_all():
    specs = tuple(_layers().values())
    assert [group.name for group in channels.removable(specs)] == ["inner", "strided"]
    coupled = {group.name: tuple(spec.path for spec in group.writers) for group in channels.removable(specs, True)}
    assert coupled == {"stem": ("stem", "outer"), "inner": ("inner",), "strided": ("strided",)}
    found = _pruned("depgraph", coupled=True)
    kept = found.plan["stem"]["kept"]
    for name in "stem", "outer":
        assert np.flatnonzero(np.any(found.variables["params"][name]["kernel"], (0, 1, 2))).tolist() == kept


def test_the_budget_is_met_by_the_fewest_channels():
    specs = tuple(_layers().values())
    groups = channels.removable(specs)
    full = sum(spec.macs for spec in specs)
    for most in full * 9 // 10, full * 7 // 10:
        kept = channels.fit(specs, groups, most)
        assert channels.macs(specs, groups, kept) <= most
        assert channels.macs(specs, groups, {name: count + 1 for name, count in kept.items()}) > most
    kept = channels.fit(specs, groups, full * 9 // 10, {"inner": 0, "strided": 1})
    assert kept["inner"] == 16 > kept["strided"]


def test_smoothness_alone_is_another_choice():
    assert _pruned("sfp", norm_weight=0.0).plan != _pruned("sfp").plan


def test_more_of_the_early_stages_goes():
    plan = _pruned("l1norm", variant="B", rate="1/4").plan
    assert len(plan["inner"]["kept"]) < len(plan["strided"]["kept"])


@pytest.mark.parametrize("changes, said", [
    (dict(method="srgpk"), "did you mean 'srgkp'?"),
    (dict(method="channels"), "expected advmoe_jax/pruning/channels.py to define scores or masks"),
    (dict(rate="0"), "rate is '0': expected more than 0 and less than 1"),
    (dict(rate=1.5), "rate is 1.5: expected a number from 0 to 1"),
    (dict(rate="1/3", groups=4), "inner: the kernels that rate 1/3 keeps: 2/3 of 8 is 5.33333: expected a whole"),
    (dict(groups=3), "inner: groups is 3: expected a divisor of the layer's 16 filters"),
    (dict(gruops=3), "did you mean 'groups'?"),
    (dict(kernels="every"), "kernels is 'every': expected '3x3' or 'all' with method srgkp, which removes grouped"),
    (dict(beta_mode="slow"), "beta_mode"), (dict(kernels="5x5"), "kernels"), (dict(skip="("), "skip is '('"),
    (dict(skip="."), "no 3x3 convolution inside a block"),
    (dict(method="given"), "has no masks"),
    (dict(method="l1norm", rate="0.99999"), "no channels that can go leave at most"),
    (dict(method="taylor_channels", example=None), "this method reads gradients: expected images with labels"),
])
def test_what_cannot_be_pruned_is_said_in_a_line(changes, said):
    apply, variables, (x, y) = _foreign()
    example = x if "example" in changes else (x, y)
    with pytest.raises(UserError) as error:
        pruning.prune(apply, variables, example, **{"groups": 4} | changes if "method" not in changes else {
            name: value for name, value in changes.items() if name != "example"})
    assert said in str(error.value) and "\n" not in str(error.value)
