"""The protocol of SR-GKP's tables against closed forms on a linear model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import parse
from advmoe_jax.core import config as configs
from advmoe_jax.core import find
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import measure, suites, verdicts
from advmoe_jax.models import network

SHAPE, STD = (4, 4, 3), np.float32([0.2, 0.1, 0.3])


def _linear(weights, x):
    return x.reshape(x.shape[0], -1) @ weights


def _case(n=40):
    numbers = np.random.default_rng(0)
    weights = jnp.asarray(numbers.standard_normal((48, 2)), jnp.float32)
    x = jnp.asarray(numbers.uniform(0.3, 0.7, (n, *SHAPE)), jnp.float32)
    return weights, x, jnp.argmax(_linear(weights, x), -1)


def _run(y, **settings):
    weights, x, _ = _case()
    attack = parse.attack("normalized", std="0.2 0.1 0.3", **settings)
    return np.asarray(attack.run(jax.tree_util.Partial(_linear, weights), jax.random.key(0), x, y))


def test_fgsm_steps_by_deviations_from_the_predicted_label():
    weights, x, predicted = _case()
    slope = np.asarray(weights[:, 1] - weights[:, 0]).reshape(SHAPE)
    away = np.where(np.asarray(predicted)[:, None, None, None] == 0, 1, -1) * np.sign(slope)
    expected = np.clip(np.asarray(x) + 0.1 * STD * away, 0, 1)
    for y in (predicted, 1 - predicted):
        np.testing.assert_allclose(_run(y, eps_sd=0.1), expected, atol=1e-6)
    np.testing.assert_allclose(_run(1 - predicted, eps_sd=0.1, labels="true"),
                               np.clip(np.asarray(x) - 0.1 * STD * away, 0, 1), atol=1e-6)


def test_pgd_3_stays_below_its_budget():
    """Three steps of 2/255 never reach 8/255."""
    x_adv = _run(_case()[2], eps_sd="8/255", step_sd="2/255", num_steps=3, labels="true")
    moved = np.abs(x_adv - np.asarray(_case()[1])).max((0, 1, 2)) / STD
    np.testing.assert_allclose(moved, 6 / 255, rtol=1e-4)


def test_images_that_become_right_count_in_the_accuracy_of_the_tables_alone():
    weights, x, predicted = _case()
    margin = np.asarray(jnp.diff(_linear(weights, x)))[:, 0]
    wrong = np.argsort(np.abs(margin))[:2]  # so near the boundary that FGSM from the predicted label turns them over
    label = np.asarray(predicted).copy()
    label[wrong] = 1 - label[wrong]
    suite = suites.together("normalized(eps_sd=0.3,std=0.2 0.1 0.3)", "linf", 0.1)

    def outputs(weights, u):
        return _linear(weights, u), {}

    found = verdicts.run({"none": jax.tree_util.Partial(outputs, weights)},
                         lambda rows: {"image": x[rows], "label": label[rows], "index": jnp.asarray(rows)},
                         np.arange(40), label, suite.specs, key=jax.random.key(0), batch_size=40, survivors_only=True)
    after = found.attempts[0].after["label"]
    reach = 0.3 * np.abs(np.asarray(weights[:, 1] - weights[:, 0]).reshape(SHAPE) * STD).sum()
    turned = np.abs(margin) < reach
    assert turned[wrong].all() and not turned.all()
    np.testing.assert_array_equal(after != np.asarray(predicted), turned)
    assert found.attempts[0].attacked.all() and np.all(after[wrong] == label[wrong])
    np.testing.assert_array_equal(found.survivors(), ~turned)
    dense = configs.default(system="standard").model
    dense.num_experts = 1
    record = measure.summarize(found, suite, network.make(dense, SHAPE, 2))
    assert record["attempts"][0]["accuracy"] == pytest.approx(record["ra"] + 2 / 40)
    assert record["attempts"][0]["broken"] == round(40 * (record["sa"] - record["ra"]))
    alone = measure.summarize(found, dataclasses.replace(suite, survivors_only=False), network.make(dense, SHAPE, 2))
    assert alone["by_attack"][0]["accuracy"] == record["attempts"][0]["accuracy"] > alone["by_attack"][0]["ra"]


@pytest.mark.parametrize("name", ["fog", "snow", "rotation", "corruption"])
def test_what_does_not_depend_on_the_model_gets_all_images(name):
    """A network that was trained on foggy images alone may know no others."""
    about = find.module("attacks", name, defines="ABOUT").ABOUT
    assert about.all_images and about.takes == "values"


@pytest.mark.parametrize("settings, says", [
    (dict(eps_sd=-1), "eps_sd is -1"), (dict(labels="guess"), "labels of normalized"),
    (dict(std="0 1 1"), "std='0 1 1'"), (dict(std=""), "std=''"), (dict(num_steps=0), "num_steps")])
def test_bad_settings_are_one_line(settings, says):
    with pytest.raises(UserError) as failure:
        parse.attack("normalized", **settings)
    assert says in str(failure.value) and "\n" not in str(failure.value)


def test_other_channels_are_one_line():
    weights, x, y = _case()
    with pytest.raises(UserError, match="3 numbers in std and images 1 channels"):
        parse.attack("normalized").run(lambda u: _linear(weights, u), jax.random.key(0), x[..., :1], y)
