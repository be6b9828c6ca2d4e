"""Losses of teams: known values and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.ops import teams


def test_what_the_team_gets_wrong():
    right, wrong = [[.7, .2, .1], [.6, .3, .1]], [[.3, .6, .1], [.35, .45, .2]]
    h, y = jnp.array([right, wrong, wrong, [[.0, 1., .0]] * 2]), jnp.array([0, 0, 1, 0])
    np.testing.assert_allclose(teams.misclassified(h, y), [0, -np.log(.4), 0, -np.log(.01)], rtol=1e-4)
    np.testing.assert_allclose(teams.misclassified(h, y, "each")[1], -np.log(.4) - np.log(.55), rtol=1e-5)
    assert jnp.mean(teams.misclassified(jnp.array([right, right, right, wrong]), jnp.zeros(4, int))) == pytest.approx(
        .229073, abs=1e-6)
    sure = jnp.array([[[.2, .1, .7], [.5, .4, .1]]])  # wrong, though the largest probability of a member is right
    assert teams.misclassified(sure, jnp.array([2]))[0] == 0
    np.testing.assert_allclose(teams.misclassified(sure, jnp.array([0])), -np.log(.3), rtol=1e-5)
    off = jnp.array([[[.9, .05, .05], [.01, .98, .01]]])
    np.testing.assert_allclose(teams.misclassified(off, jnp.array([0]), "any_class"), -np.log(.02), rtol=1e-4)


def test_the_worst_images_have_a_gradient():
    h = jnp.array([[[.0, 1., .0]]])
    slope = jax.grad(lambda h: jnp.sum(teams.misclassified(h, jnp.array([0]))))(h)
    np.testing.assert_allclose(slope, [[[0, 100, 0]]], rtol=1e-4)


def test_adp():
    y = jnp.array([0])
    apart = jnp.array([[[.5, .5, 0], [.5, 0, .5]]])
    log_det = lambda h: -teams.adp(h, y, 0.0, 1.0)[0]  # noqa: E731
    assert log_det(apart) == pytest.approx(0, abs=1e-4)
    assert log_det(jnp.repeat(apart[:, :1], 2, 1)) == pytest.approx(np.log(2e-6), abs=0.2)
    np.testing.assert_allclose(teams.adp(apart, y, 1.0, 0.0), .5 * np.log(.5) + .5 * np.log(.25), rtol=1e-5)
    slope = jax.grad(lambda h: jnp.sum(teams.adp(h, y)))(jnp.array([[[1., 0, 0], [1., 0, 0]]]))
    assert np.all(np.isfinite(slope)), "a member that is sure has no wrong classes"


def test_gal():
    gradients = jnp.array([[[1., 0], [0, 2.], [-3., 0]]])
    np.testing.assert_allclose(teams.gal(gradients), np.log(1 + np.exp(-1) + 1), rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(lambda g: jnp.sum(teams.gal(g)))(jnp.zeros((1, 2, 3)))))


def test_soe():
    numbers = np.random.default_rng(0)
    said, logits = numbers.normal(size=(5, 3)), 2 * numbers.normal(size=(5, 3, 4))
    y, sigma = np.array([0, 1, 2, 3, 0]), .7
    right = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = right[np.arange(5), :, y]
    p = 1 / (1 + np.exp(-said))
    cross = -(right * np.log(p) + (1 - right) * np.log(1 - p)).sum(1)
    soft = -sigma * np.log(np.sum(right ** (1 / sigma), 1))
    arrays = [jnp.asarray(of, jnp.float32) for of in (said, logits)]
    np.testing.assert_allclose(teams.soe(*arrays, jnp.asarray(y), sigma), cross + soft, rtol=1e-4)
    of_said, of_logits = jax.grad(lambda *of: jnp.sum(teams.soe(*of, jnp.asarray(y), sigma)), (0, 1))(*arrays)
    np.testing.assert_allclose(of_said, p - right, rtol=1e-3, atol=1e-5)
    share = right ** (1 / sigma) / np.sum(right ** (1 / sigma), 1, keepdims=True)
    np.testing.assert_allclose(of_logits[np.arange(5), :, y], share * (right - 1), rtol=1e-3, atol=1e-5)
    at_least = teams.soe(*arrays, jnp.asarray(y), 1e-3) - cross
    np.testing.assert_allclose(at_least, -np.log(right.max(1)), rtol=1e-2, atol=1e-3)
