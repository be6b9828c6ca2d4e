"""Scores of single weights: NIS, ERM, ASE, BNSF, against their formulas."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import model as models
from advmoe_jax.models import resnet
from advmoe_jax.ops import trace
from advmoe_jax.pruning import ase, bnsf, erm, nis, pruned

SHAPE, CLASSES = (8, 8, 1), 3
NETS = {"resnet": ("model.name=resnet", "model.depth=6", "model.num_experts=1", "model.model_scale=1"),
        "vgg": ("model.name=vgg", "model.depth=11", "model.num_experts=1", "model.model_scale=1"),
        "padded": ("model.name=cifar_resnet", "model.depth=8", "model.shortcut_pad=both",
                   "model.num_experts=1", "model.model_scale=1"),
        "routed": ("model.name=resnet", "model.depth=6", "model.router_width=4", "model.experts=disjoint")}
each = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "routed" else ())
                                        for name in NETS])


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    """model.depth=6: a ResNet of two blocks, the second with a projection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.DEPTHS, "6", (1, 1))
        yield


@functools.cache
def _net(name):
    config = configs.default()
    configs.override_all(config, ["model.width=4", *NETS[name]])
    model = models.make(config.model, SHAPE, CLASSES)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    numbers = np.random.default_rng(0)
    variables["params"] = jax.tree.map(lambda leaf: leaf + 0.05 * numbers.normal(size=leaf.shape).astype(np.float32),
                                       variables["params"])
    variables["batch_stats"] = jax.tree.map(  # the variances, which are ones
        lambda leaf: leaf * numbers.uniform(0.2, 2, leaf.shape).astype(np.float32), variables["batch_stats"])
    return model, variables


def _subject(name, x=None, y=None):
    model, variables = _net(name)
    return pruned.of(lambda variables, x: model.outputs_fn(variables)(x)[0], variables, model.layers, "1/2", "every",
                     "(^|/)router/", x, y)


def _subject_of(module, variables, x, y=None):
    layers = trace.layers_of(lambda x: module.apply(variables, x), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
    return pruned.of(module.apply, variables, layers, "1/2", "every", "", x, y)


class _Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="two")(nn.relu(nn.Dense(2, name="one")(x)))


def test_neuron_importance_of_two_layers():
    params = {"one": {"kernel": np.array([[3., -1], [1, 2], [0, 1]]), "bias": np.ones(2)},
              "two": {"kernel": np.array([[1., 0], [-2, 3]]), "bias": np.ones(2)}}  # transposed: (I, O)
    subject = _subject_of(_Two(), {"params": params}, np.zeros((4, 3), np.float32))
    found = nis.output_scores(subject)
    np.testing.assert_allclose(found["two"], [1, 1])
    np.testing.assert_allclose(found["one"], [1, 5])
    scores = nis.score(subject, nis.Config())
    np.testing.assert_allclose(scores["two"], np.sqrt(6 / 2) * np.array([[1, 0], [-2, 3]]) / 3, rtol=1e-6)
    np.testing.assert_allclose(scores["one"], np.sqrt(6 / 3) * np.array([[3., -5], [1, 10], [0, 5]]) / 10, rtol=1e-6)


class _PreActivation(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="one")(x)
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = x + nn.Dense(2, name="two")(nn.relu(norm(name="between")(x)))
        return nn.Dense(2, name="last")(nn.relu(norm(name="end")(x)))


def test_neuron_importance_through_a_norm_that_reads_a_sum():
    """Its factor counts as that of any other, and its mean and bias as little."""
    params = {"one": {"kernel": np.ones((3, 2)), "bias": np.ones(2)},
              "two": {"kernel": np.array([[1., -2], [0, 3]]), "bias": np.ones(2)},
              "last": {"kernel": np.array([[1., -1], [2, 0]]), "bias": np.ones(2)},
              "between": {"scale": np.array([-1., 5]), "bias": np.ones(2)},
              "end": {"scale": np.array([3., -4]), "bias": np.full(2, -9.)}}
    stats = {name: {"mean": np.full(2, 7.), "var": np.full(2, var)} for name, var in (("between", 1), ("end", 4))}
    found = nis.output_scores(_subject_of(_PreActivation(), {"params": params, "batch_stats": stats}, np.zeros(
        (4, 3), np.float32)))
    at_end = np.array([2 * 3 / 2, 2 * 4 / 2])
    np.testing.assert_allclose(found["two"], at_end, rtol=1e-4)
    np.testing.assert_allclose(found["one"], at_end + [1 * (1 * 3 + 2 * 4), 5 * 3 * 4], rtol=1e-4)


def _consumed(subject, matters, path, width):
    """What an input of a layer matters: the sum of the weight scores that leave it, in the layers that read it."""
    found = np.zeros(width)
    for spec in subject.layers:
        if path in spec.inputs:
            sizes = np.abs(subject.leaf(f"{spec.path}/kernel")) * matters[spec.path]
            into = sizes.sum(tuple(axis for axis in range(sizes.ndim) if axis != sizes.ndim - 2))
            missing = len(into) - width  # empty channels on both sides
            found += into[missing // 2:missing // 2 + width] if missing else into
    return found


@each
def test_what_an_output_matters_is_what_leaves_it(name):
    """Eq. 8 at every layer, shortcuts and norms included: on one scale, or the sum would not hold."""
    subject = _subject(name)
    matters, checked = nis.output_scores(subject), 0
    for spec in subject.layers:
        if not spec.path.startswith("router/") and any(spec.path in other.inputs for other in subject.layers):
            through = _consumed(subject, matters, spec.path, spec.width) * subject.norm_factor(spec)
            windows = spec.kernel[-1] // spec.width
            np.testing.assert_allclose(matters[spec.path], np.tile(through, windows) / windows, rtol=1e-6,
                                       err_msg=spec.path)
            checked += 1
    assert checked > 4
    last = [spec.path for spec in subject.layers if spec.path.split("/")[-1] in ("linear", "classifier")]
    assert all(np.all(matters[path] == 1) for path in last) and len(last) == 1


def test_scores_are_on_one_scale_with_the_signs_of_the_weights(name="resnet"):
    x = np.random.default_rng(1).uniform(size=(3, *SHAPE)).astype(np.float32)
    subject = _subject(name, x, np.arange(3) % CLASSES)
    for method, cfg in ((nis, nis.Config()), (erm, erm.Config()), (bnsf, bnsf.Config()), (ase, ase.Config()),
                        (ase, ase.Config(hessian="kfac"))):
        scores = method.score(subject, cfg)
        assert scores.keys() == {spec.path for spec in subject.convs}
        for spec in subject.convs:
            kernel, score = subject.leaf(f"{spec.path}/kernel"), np.asarray(scores[spec.path])
            assert score.shape == kernel.shape and np.all(np.isfinite(score))
            assert np.all(np.sign(score) * np.sign(kernel) >= 0)
            assert np.abs(score).max() == pytest.approx(np.sqrt(6 / np.prod(kernel.shape[:-1])), rel=1e-5)


def test_sizes_known_by_hand():
    params = {"one": {"kernel": np.array([[-2.]] * 6 + [[1.]] * 0), "bias": np.zeros(1)}}
    params["one"]["kernel"][0] = 1

    class _One(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="one")(x)

    subject = _subject_of(_One(), {"params": params}, np.zeros((2, 6), np.float32))
    np.testing.assert_allclose(np.abs(erm.score(subject, erm.Config())["one"])[:2, 0], [0.5, 1])


def test_weights_behind_their_norm():
    subject = _subject("resnet")
    spec = next(spec for spec in subject.layers if spec.path == "backbone/layer1_0/conv1")
    params, stats = (tree.named_leaves(subject.variables[part]) for part in ("params", "batch_stats"))
    factor = np.abs(params[f"{spec.norm}/scale"]) / np.sqrt(stats[f"{spec.norm}/var"] + 1e-5)
    kernel = params[f"{spec.path}/kernel"]
    expected = kernel * factor
    expected *= np.sqrt(6 / np.prod(kernel.shape[:-1])) / np.abs(expected).max()
    np.testing.assert_allclose(bnsf.score(subject, bnsf.Config())[spec.path], expected, rtol=1e-5, atol=1e-7)


def test_saliency_is_the_mean_square_of_single_gradients():
    model, variables = _net("resnet")
    x = np.random.default_rng(1).uniform(size=(3, *SHAPE)).astype(np.float32)
    y = np.arange(3) % CLASSES
    found = ase.score(_subject("resnet", x, y), ase.Config())
    kernel = variables["params"]["backbone"]["linear"]["kernel"]

    def loss(kernel, i):
        params = {"backbone": variables["params"]["backbone"] | {"linear": variables["params"]["backbone"]["linear"] | {
            "kernel": kernel}}}
        return -jax.nn.log_softmax(model.outputs_fn(variables | {"params": params})(x[i:i + 1])[0])[0, y[i]]

    squares = np.mean([np.square(jax.grad(loss)(kernel, i)) for i in range(3)], 0)
    size = squares * kernel**2 / 2
    expected = np.sqrt(6 / len(kernel)) * np.sign(kernel) * size / size.max()
    np.testing.assert_allclose(found["backbone/linear"], expected, rtol=1e-3, atol=1e-6)


def test_kronecker_factors_of_a_linear_layer():
    numbers = np.random.default_rng(0)
    params = {name: {"kernel": numbers.normal(size=size).astype(np.float32), "bias": numbers.normal(size=2).astype(
        np.float32)} for name, size in (("one", (3, 2)), ("two", (2, 2)))}
    x, y = numbers.normal(size=(5, 3)).astype(np.float32), np.array([0, 1, 0, 1, 1])
    found = ase.score(_subject_of(_Two(), {"params": params}, x, y), ase.Config(hessian="kfac"))["one"]
    hidden = x @ params["one"]["kernel"] + params["one"]["bias"]
    logits = np.maximum(hidden, 0) @ params["two"]["kernel"] + params["two"]["bias"]
    slope = (np.asarray(jax.nn.softmax(logits)) - np.eye(2)[y]) @ params["two"]["kernel"].T * (hidden > 0)
    kernel = params["one"]["kernel"]
    size = np.abs(np.square(slope).sum(0) * kernel * ((x.T @ x) @ kernel))
    expected = np.sqrt(6 / 3) * np.sign(kernel) * size / size.max()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_what_is_missing_is_said():
    with pytest.raises(UserError, match="ase reads gradients: expected images with labels"):
        ase.score(_subject("resnet"), ase.Config())
