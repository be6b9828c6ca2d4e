"""Normalisation inside the model: the same as by hand outside, and texts that are refused."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import model as models
from advmoe_jax.models import normalisation

pytestmark = pytest.mark.usefixtures("tiny_resnet")
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SHAPE, CLASSES = (8, 8, 3), 4
MEAN, STD = "0.485 0.456 0.406", "0.2,0.25, 0.3"
BY_HAND = (np.float32([.485, .456, .406]), np.float32([.2, .25, .3]))
DENSE = ("model.num_experts=1",)
KINDS = {"dense": DENSE, "layer": (), "pathways": ("model.routing=global", "model.dispatch=blocks"),
         "ensemble": ("system.name=standard", "model.name=ensemble", "model.num_members=2", *DENSE)}


@functools.cache
def _model(kind, *more):
    config = configs.default()
    configs.override_all(config, ["model.depth=4", "model.width=4", *KINDS[kind], *more])
    if kind not in ("dense", "ensemble"):
        configs.override(config, "model.router_width=4")
    return models.make(config.model, SHAPE, CLASSES)


def _variables(shapes):
    """Parameters of both signs, and statistics above 0."""
    numbers = np.random.default_rng(0)
    return {part: jax.tree.map(lambda leaf, low=low: numbers.uniform(low, .5, leaf.shape).astype(np.float32), tree)
            for (part, tree), low in zip(sorted(shapes.items()), (.1, -.5))}


def _images(*begin):
    return np.random.default_rng(1).uniform(size=(*begin, *SHAPE)).astype(np.float32)


def _normalised(x):
    mean, std = (numbers.reshape((1,) * (x.ndim - 1) + (3,)) for numbers in BY_HAND)
    return (x - mean) / std


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=pytest.mark.slow) if kind == "pathways" else kind for kind in KINDS])
def test_it_is_the_same_as_by_hand(kind):
    plain, own = _model(kind), _model(kind, f"model.mean={MEAN}", f"model.std={STD}")
    assert own.shapes == plain.shapes and own.layers == plain.layers
    variables = _variables(plain.shapes)
    x = _images(6)
    evaluate = jax.jit(lambda fn, x: fn(x))
    found, wanted = evaluate(own.outputs_fn(variables), x), evaluate(plain.outputs_fn(variables), _normalised(x))
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6), found, wanted)
    assert not np.allclose(found[0], evaluate(plain.outputs_fn(variables), x)[0], rtol=1e-3)


def test_a_router_on_the_image_reads_normalised_images():
    plain, own = (_model("layer", "model.routing=embedding", *more).module for more in (
        (), (f"model.mean={MEAN}", f"model.std={STD}")))
    x = _images(6)
    variables = _variables(jax.eval_shape(lambda: plain.init(jax.random.key(0), x, method="scores")))
    found, wanted, other = (jax.jit(lambda *data, module=module: module.apply(*data, method="scores"))(
        variables, images) for module, images in ((own, x), (plain, _normalised(x)), (plain, x)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, other, rtol=1e-3)


def test_training_passes_are_normalised_too():
    plain, own = _model("dense"), _model("dense", f"model.mean={MEAN}", f"model.std={STD}")
    variables = _variables(plain.shapes)
    x = _images(6, 2)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5),
                 jax.jit(own.train_pass)(variables, x), jax.jit(plain.train_pass)(variables, _normalised(x)))


def _refused(*fields, kind="dense"):
    config = configs.default()
    configs.override_all(config, ["system.name=standard", "model.depth=4", *KINDS[kind], *fields])
    with pytest.raises(UserError) as error:
        configs.check(config)
        models.make(config.model, SHAPE, CLASSES)
    assert str(error.value).isprintable() and "expected" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["dense", "ensemble"])
@pytest.mark.parametrize("mean, std, message", [
    ("0.5 x 0.5", "1 1 1", "model.mean is '0.5 x 0.5': expected a finite number for each channel"),
    (" , ", "1", "model.mean is ' , ': expected"), ("nan 0 0", "1 1 1", "model.mean is 'nan 0 0': expected a finite"),
    ("0 0 0", "1 1 inf", "model.std is '1 1 inf'"), ("1e39 0 0", "1 1 1", "model.mean is '1e39 0 0'"),
    ("0 0 0", "1 0 1", "model.std is '1 0 1': expected numbers above 0"), ("0 0 0", "1 -1 1", "numbers above 0"),
    ("0 0 0", "1e-50 1 1", "numbers above 0"),
    ("0 0 0", "", "model.mean is '0 0 0' and model.std is empty: expected both or neither"),
    ("", "1 1 1", "model.std is '1 1 1' and model.mean is empty: expected both or neither"),
    ("0 0 0", "1 1", "model.mean has 3 numbers and model.std 2: expected one for each channel in both"),
    ("0", "1", "model.mean and model.std have 1 numbers and images 3 channels: expected one for each channel")])
def test_texts_that_are_refused(mean, std, message, kind):
    assert message in _refused(f"model.mean={mean}", f"model.std={std}", kind=kind)


def test_empty_texts_are_no_normalisation():
    assert normalisation.read("", "", 3) == ((), ())
    x = np.ones((1, 2, 2, 3), np.float32)
    assert normalisation.apply(x, (), ()) is x


@pytest.mark.parametrize("name", ["imagenet_r18", "tiny_imagenet_r18", "imagenette_r18"])
def test_configs_of_imagenet_normalise(name):
    config = configs.load(str(CONFIGS / f"{name}.py"))
    configs.check(config)
    assert (config.model.mean, config.model.std) == normalisation.IMAGENET
