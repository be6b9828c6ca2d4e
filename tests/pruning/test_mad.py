"""MAD: soft masks by hand, saliencies by laid out patches, which weights go, and that they stay gone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_images
from flax import linen as nn

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.ops import trace
from advmoe_jax.pruning import kfac, mad, pruned
from advmoe_jax.systems import prune
from advmoe_jax.systems.sources import Source
from advmoe_jax.train import loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
LABELS = np.array([0, 1, 1, 0, 1])


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2, padding=1, name="conv")(x))
        return nn.Dense(2, name="linear")(x.reshape(len(x), -1))


@functools.cache
def _subject():
    numbers = np.random.default_rng(0)
    params = {"conv": {"kernel": (3, 3, 2, 3), "bias": (3,)}, "linear": {"kernel": (12, 2), "bias": (2,)}}
    params = jax.tree.map(lambda shape: numbers.normal(size=shape).astype(np.float32), params,
                          is_leaf=lambda leaf: isinstance(leaf, tuple))
    x = numbers.uniform(size=(5, 4, 4, 2)).astype(np.float32)
    net, one = _Net(), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    layers = trace.layers_of(lambda x: net.apply({"params": params}, x), one)
    return pruned.of(net.apply, {"params": params}, layers, "1/2", "every", "", x, LABELS)


@functools.cache
def _soft(steps=3, learning_rate=0.3):
    subject, cfg = _subject(), mad.Config(mask_steps=steps, mask_learning_rate=learning_rate)
    return jax.device_get(mad.soft_masks(subject, cfg)(subject.variables["params"], kfac.kernels(subject), subject.x,
                                                       LABELS))


def _loss(subject, soft):
    masked = {path: of | {"kernel": of["kernel"] * soft[path]} for path, of in subject.variables["params"].items()}
    logits = subject.apply({"params": masked}, subject.x)
    return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(LABELS)), LABELS])


def test_soft_masks_are_trained_by_adam_within_their_bounds():
    """By hand: m begins where the mask is 1, above which it does not go, and never below 1e-4."""
    subject = _subject()
    slope = jax.jit(jax.grad(lambda m: _loss(subject, jax.tree.map(jax.nn.softplus, m))))
    top, bottom = np.log(np.e - 1), np.log(np.expm1(1e-4))
    m = {path: np.full(of["kernel"].shape, top, np.float32) for path, of in subject.variables["params"].items()}
    mean = square = jax.tree.map(np.zeros_like, m)
    for t in range(1, 4):
        g = slope(m)
        mean = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, mean, g)
        square = jax.tree.map(lambda a, g: 0.999 * a + 0.001 * g**2, square, g)
        m = jax.tree.map(lambda m, a, b, t=t: np.clip(m - 0.3 * (a / (1 - 0.9**t)) / (
            np.sqrt(b / (1 - 0.999**t)) + 1e-8), bottom, top), m, mean, square)
    found = _soft()
    for path in m:
        np.testing.assert_allclose(found[path], np.log1p(np.exp(m[path])), rtol=1e-4)
        assert found[path].max() == 1 and found[path].min() < 0.7
    assert _loss(subject, found) < _loss(subject, {path: np.ones_like(of) for path, of in found.items()})
    far = _soft(3, 100.0)["conv"]
    assert far.min() == pytest.approx(1e-4, rel=1e-3) and set(np.unique(far.round(3))) == {0, 1}


def _by_hand(subject, soft):
    """Of both layers, with A and G laid out as matrices: diagonals of G_oo dw_o (dw_o A) / 2."""
    params = subject.variables["params"]
    x, out = np.pad(subject.x, ((0, 0), (1, 1), (1, 1), (0, 0))), {}
    patches = np.stack([x[:, 2 * i:2 * i + 3, 2 * j:2 * j + 3].reshape(5, -1) for i in range(2) for j in range(2)], 1)
    w = {path: of["kernel"].reshape(-1, of["kernel"].shape[-1]) for path, of in params.items()}
    masked = {path: w[path] * soft[path].reshape(w[path].shape) for path in w}
    before = patches @ masked["conv"] + params["conv"]["bias"]
    read = np.maximum(before, 0).reshape(5, -1)
    p = np.asarray(jax.nn.softmax(read @ masked["linear"] + params["linear"]["bias"])) - np.eye(2)[LABELS]
    of_conv = (p @ masked["linear"].T).reshape(before.shape) * (before > 0)
    for path, a, g, places in (("conv", patches, of_conv, 4), ("linear", read[:, None], p[:, None], 1)):
        flat, slopes = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        second, outer = flat.T @ flat / 5, slopes.T @ slopes / (5 * places)  # a sum over places, and a mean
        dw = w[path] - masked[path]
        out[path] = np.stack([np.diag(np.outer(outer[o, o] * dw[:, o], dw[:, o] @ second)) / 2
                              for o in range(dw.shape[1])], 1).reshape(soft[path].shape)
    return out


def test_saliencies_are_those_of_factors_that_are_laid_out():
    subject, soft = _subject(), _soft()
    found = mad.saliency(subject, mad.Config(mask_steps=3, mask_learning_rate=0.3))
    for path, expected in _by_hand(subject, soft).items():
        np.testing.assert_allclose(found[path], expected, rtol=2e-3, atol=1e-5 * np.abs(expected).max())
        assert np.all(found[path][soft[path] == 1] == 0), "what stays whole does no damage"
    assert np.any(found["conv"] < 0) and np.any(found["conv"] > 0), "of either sign"


def test_parts_of_the_images_count_alike(monkeypatch):
    """Each has masks of its own."""
    subject, cfg = _subject(), mad.Config(mask_steps=2)
    cut = slice(0, 3), slice(3, 5)
    whole = [mad.saliency(pruned.of(subject.apply, subject.variables, subject.layers, "1/2", "every", "",
                                    subject.x[part], LABELS[part]), cfg) for part in cut]
    monkeypatch.setattr(type(subject), "parts", lambda self, values: [values[part] for part in cut])
    found = mad.saliency(subject, cfg)
    for path in found:
        np.testing.assert_allclose(found[path], (whole[0][path] + whole[1][path]) / 2, rtol=1e-4, atol=1e-9)


SALIENCY = {"a": np.array([3.0, -1, 0, 5, 0, 0]).reshape(1, 1, 2, 3), "b": np.array([4.0, 2]).reshape(1, 1, 1, 2),
            "c": np.array([[1.0, 9], [2, 8], [3, -7], [4, 6]])}
KERNELS = {"a": np.array([1, 1, 0.1, 1, -0.3, 0.2]).reshape(1, 1, 2, 3), "b": np.ones((1, 1, 1, 2)),
           "c": np.ones((4, 2))}


@pytest.mark.parametrize("scope, rate, kept", [
    ("global", "1/2", {"a": [0, 3], "b": [0, 1], "c": [(0, 1), (1, 1), (2, 0), (3, 0)]}),
    ("global", "1/4", {"a": [0, 3, 4, 5], "b": [0, 1], "c": [(0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1)]}),
    ("layer", "1/2", {"a": [0, 3, 4], "b": [0], "c": [(0, 1), (1, 1), (2, 0), (3, 0)]})])
def test_the_lowest_go(scope, rate, kept, monkeypatch):
    """Of all convolutions together or of each; of the linear layer, of each output; negative ones before zeros, of
    which the smallest weights go."""
    subject = pruned.of(None, {"params": {}}, _subject().layers, rate, "every")
    monkeypatch.setattr(mad, "saliency", lambda *_: SALIENCY)
    monkeypatch.setattr(kfac, "kernels", lambda *_: KERNELS)
    found, _ = mad.masks(subject, mad.Config(scope=scope))
    for path in "ab":
        assert np.flatnonzero(found[path]).tolist() == kept[path] and found[path].shape == SALIENCY[path].shape
    assert sorted(zip(*map(np.ndarray.tolist, np.nonzero(found["c"])))) == kept["c"]


def test_a_layer_that_is_emptied_is_told(monkeypatch):
    subject = pruned.of(None, {"params": {}}, _subject().layers, "3/4", "every")
    monkeypatch.setattr(kfac, "kernels", lambda *_: KERNELS)
    monkeypatch.setattr(mad, "saliency", lambda *_: SALIENCY | {"b": -SALIENCY["b"]})
    with pytest.warns(UserWarning, match="nothing of b is kept"):
        mad.masks(subject, mad.Config())


def test_what_is_gone_stays_gone_before_others_go(monkeypatch):
    """Its saliency is 0, above those of weights that do harm."""
    gone = np.ones((1, 1, 2, 3), bool)
    gone[0, 0, 0, 2] = False
    subject = pruned.of(None, {"params": {}}, _subject().layers, "1/8", "every", given={"a/kernel": gone})
    monkeypatch.setattr(kfac, "kernels", lambda *_: KERNELS)
    monkeypatch.setattr(mad, "saliency", lambda *_: SALIENCY)
    assert np.flatnonzero(mad.masks(subject, mad.Config())[0]["a"]).tolist() == [0, 1, 3, 4, 5]


def _config(*overrides):
    config = configs.default(system="prune")
    configs.override_all(config, [
        "model.num_experts=1", "model.model_scale=1", "model.depth=4", "model.width=4", "data.batch_size=8",
        "train.length=4 steps", "init_from=base", "system.method=mad", "system.kernels=every", "system.rate=4/5",
        "system.images=12", "system.mask_steps=2", "system.loss=madry", "train.attack=fgsm", "attack.eps=0.1",
        "optim.backbone.weight_decay=0.1", "data.pad=0", "data.flip=false", *overrides])
    return config


def test_a_run_attacks_its_images_and_keeps_its_masks(monkeypatch):
    config, data, mesh = _config(), random_images.data(16), meshes.make()
    configs.check(config)
    net = network.make(config.model, data.image_shape, data.num_classes)
    variables = jax.device_get(jax.jit(net.init)(jax.random.key(3)))
    asked, make = [], prune.score_images
    monkeypatch.setattr(prune, "score_images", lambda *args: asked.append(args[-1]) or make(*args))
    system = prune.make(config, net, data, mesh, {"base": Source(None, config, net, variables, {}, 0)})
    assert asked == ["attacked"] and system.files["pruning.json"]["leaves_out"] == "masks of biases"
    state = system.init(rng.key(0, "init"))
    first = jax.device_get(state)
    for step in range(2):
        state, _ = loop.iterate(system, state, step, 2, lambda _: pipeline.device_batch(mesh, data.train, np.arange(8)))
    before, after, masks = (tree.named_leaves(jax.device_get(part)) for part in (first.params, state.params,
                                                                                 state.masks))
    kernels = {path: mask for path, mask in masks.items() if path.endswith("kernel")}
    convs = [mask for mask in kernels.values() if mask.ndim == 4]
    assert sum(mask.sum() for mask in convs) == -(-sum(mask.size for mask in convs) // 5)
    [linear] = [mask for mask in kernels.values() if mask.ndim == 2]
    assert linear.sum(0).tolist() == [1] * 4, "of four inputs of each output"
    for path, mask in masks.items():
        full = np.broadcast_to(mask, after[path].shape)
        assert not np.any(after[path][~full]) and (not full.any() or np.any(after[path] != before[path])), path


@pytest.mark.parametrize("overrides, said", [
    (["system.scored_on=attacked"], "system.scored_on is 'attacked', which has no effect here"),
    (["system.mask_steps=0"], "system.mask_steps is 0: expected"), (["system.scope=all"], "system.scope"),
    (["system.mask_learning_rate=0"], "system.mask_learning_rate is 0")])
def test_bad_input_is_said_in_a_line(overrides, said):
    with pytest.raises(UserError) as error:
        configs.check(_config(*overrides))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_labels_are_needed():
    subject = _subject()
    with pytest.raises(UserError, match="mad reads gradients: expected attacked images with labels"):
        mad.saliency(pruned.of(subject.apply, subject.variables, subject.layers, "1/2", "every", "", subject.x),
                     mad.Config())
