"""Attacks of training by name: one as in evaluation, and several in turn, the worst, or the mean of their losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import parse
from advmoe_jax.core import config as configs
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import network
from advmoe_jax.ops import losses
from advmoe_jax.systems import adversarial, adversary

pytestmark = pytest.mark.usefixtures("tiny_resnet")
BATCH, SHAPE, CLASSES = 6, (8, 8, 1), 4
FGSM, PGD = "fgsm", "pgd(num_steps=3,step_size=0.625 eps,keep=last)"


def _config(attack, *overrides):
    config = configs.default(system="standard", data="digits")
    configs.override_all(config, ["model.num_experts=1", "model.depth=4", "model.width=4", "system.loss=madry",
                                  "attack.eps=0.1", f"train.attack={attack}", *overrides])
    return config


@functools.cache
def _case():
    """A network, its variables, images, labels and indices."""
    net = network.make(_config(FGSM).model, SHAPE, CLASSES)
    x = jax.random.uniform(jax.random.key(1), (BATCH, *SHAPE))
    return net, jax.jit(net.init)(jax.random.key(0)), x, jnp.arange(BATCH) % CLASSES, jnp.arange(BATCH)


def _images(config, loss="ce", step=0):
    net, variables, x, y, index = _case()
    attack = adversary.training_attack(net, config, loss)
    return jax.jit(attack)(variables, jax.random.key(5), x, y, index, jnp.int32(step))


def _alone(text, loss="ce", **more):
    return np.asarray(_images(_config(text, **more), loss)[:, 0])


def test_one_attack_is_that_of_an_evaluation():
    """With the same settings, keys and gradient: the same images, and no other number of them."""
    net, variables, x, y, index = _case()
    [spec] = parse.attacks(PGD, norm="linf", eps="0.1")
    logits_fn = jax.tree_util.Partial(lambda outputs_fn, u: outputs_fn(u)[0], net.outputs_fn(variables))
    expected = spec.run(logits_fn, rng.per_example(jax.random.key(5), index), x, y)
    images = _images(_config(PGD))
    assert images.shape == (BATCH, 1, *SHAPE)
    np.testing.assert_allclose(images[:, 0], expected, atol=1e-6)
    assert 0.09 < np.abs(images[:, 0] - x).max() <= 0.1 + 1e-6


def test_several_take_turns():
    config = _config(f"{FGSM} {PGD}")
    for step in range(3):
        np.testing.assert_array_equal(_images(config, step=step)[:, 0], _alone((FGSM, PGD)[step % 2]))


def test_the_worst_of_several():
    """Of each image that of the larger loss."""
    net, variables, _, y, _ = _case()
    both = np.stack([_alone(FGSM), _alone(PGD)])
    values = np.stack([losses.cross_entropy(net.outputs_fn(variables)(u)[0], y) for u in both])
    worst = _images(_config(f"{FGSM} {PGD}", "train.several=worst"))
    assert worst.shape == (BATCH, 1, *SHAPE)
    np.testing.assert_allclose(worst[:, 0], both[values.argmax(0), np.arange(BATCH)], atol=1e-6)


def test_the_mean_of_several():
    """All images come back, and the loss is the mean of the losses on each."""
    net, variables, x, y, _ = _case()
    config = _config(f"{FGSM} {PGD}", "train.several=mean")
    images = _images(config)
    assert images.shape == (BATCH, 2, *SHAPE)
    loss, (_, metrics) = adversarial.objective(net, config)(
        variables["params"], variables["batch_stats"], {"image": x, "adversarial": images, "label": y})
    logits, *_ = net.train_pass(variables, images)
    each = [jnp.mean(losses.cross_entropy(logits[:, i], y)) for i in range(2)]
    assert float(loss) == pytest.approx(float(sum(each) / 2), rel=1e-5)
    assert float(metrics["ra"]) == pytest.approx(float(jnp.mean(jnp.argmax(logits, -1) == y[:, None])))


def test_an_attack_may_raise_another_loss_than_the_system():
    """Under TRADES, whose attack starts where the KL is flat, `loss=ce` moves along another gradient."""
    by_kl, by_ce = (_images(_config(f"pgd(num_steps=1,start=none,step_size=1 eps,keep=last{loss})",
                                    "system.loss=trades"), "kl") for loss in ("", ",loss=ce"))
    np.testing.assert_allclose(by_ce[:, 0], _alone(FGSM), atol=1e-6)
    assert not np.allclose(by_kl, by_ce)


def test_attacks_without_a_gradient_train_too():
    images = _images(_config("square(num_queries=5)"))
    assert np.all(np.abs(images[:, 0] - _case()[2]) <= 0.1 + 1e-6)


@pytest.mark.parametrize("text, words", [
    ("pdg", "unknown attack 'pdg'"), ("adaptive", "adaptive reads router_logits"),
    ("exits", "exits reads member_logits")])
def test_what_the_model_cannot_take_is_refused(text, words):
    with pytest.raises(UserError, match=words) as caught:
        adversary.training_attack(_case()[0], _config(text), "ce")
    assert "\n" not in str(caught.value)
