"""Facts measured on the released AdvMoE code: routed convolution, losses, expert windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.models.layers import Conv, RoutedConv
from advmoe_jax.ops import losses, routing
from advmoe_jax.ops.dispatch import Choice

SCORES = jnp.array([[1., 0.], [0., 1.]])
IMAGES = jnp.array([5., 7.]).reshape(2, 1, 1, 1)
KERNEL = jnp.array([1., 2., 3., 4.]).reshape(1, 1, 1, 4)  # two experts of two channels
COTANGENT = jnp.array([[1., 10.], [100., 1000.]])
LAYER = RoutedConv(channels=4, width=2, num_experts=2, experts="disjoint", size=1)


def _routed(scores, kernel, x, grad="ste_selected"):
    gate, _ = routing.gates(scores, routing.hard(grad), 0)
    return LAYER.apply({"params": {"kernel": kernel}}, x, Choice(gate))[:, 0, 0]


def _grads(grad):
    return jax.grad(lambda *a: jnp.sum(COTANGENT * _routed(*a, grad)), argnums=(0, 1, 2))(SCORES, KERNEL, IMAGES)


def test_routed_convolution():
    np.testing.assert_array_equal(_routed(SCORES, KERNEL, IMAGES), [[5, 10], [21, 28]])
    scores, kernel, x = _grads("ste_selected")
    np.testing.assert_array_equal(scores, [[105, 0], [0, 30100]])
    np.testing.assert_array_equal(kernel.ravel(), [5, 50, 700, 7000])
    np.testing.assert_array_equal(x.ravel(), [21, 4300])


def test_router_gradients():
    np.testing.assert_array_equal(_grads("none")[0], np.zeros((2, 2)))
    # <g, y_e> for every expert: image 0 has y = [5, 10] and [15, 20], image 1 [7, 14] and [21, 28].
    np.testing.assert_array_equal(_grads("ste_full")[0], [[105, 215], [14700, 30100]])
    p = jax.nn.softmax(SCORES)
    own = jnp.array([[105.], [30100.]])
    np.testing.assert_allclose(_grads("scaled")[0], own * (jnp.eye(2) - p), rtol=1e-6)
    for grad in routing.ROUTER_GRADS:
        for ours, plain in zip(_grads(grad)[1:], _grads("none")[1:]):
            np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("scores, expert", [([0., 0.], 0), ([np.nan, 1.], 0), ([1., np.nan], 1), ([-np.inf, -9.], 1)])
def test_ties_and_non_finite_scores(scores, expert):
    gate, ids = routing.gates(jnp.array([scores]), routing.hard(), 0)
    np.testing.assert_array_equal(ids, [expert])
    np.testing.assert_array_equal(gate, np.eye(2)[[expert]])


def test_one_expert_is_a_plain_convolution():
    x, kernel = (jax.random.normal(key, shape) for key, shape in zip(
        jax.random.split(jax.random.key(0)), [(2, 8, 8, 4), (3, 3, 4, 6)]))
    variables = {"params": {"kernel": kernel}}
    for experts in ("shared", "disjoint"):
        routed = RoutedConv(6, 6, 1, experts).apply(variables, x, Choice(jnp.ones((2, 1))))
        np.testing.assert_array_equal(routed, Conv(6).apply(variables, x))


def test_windows_of_the_experts():
    assert routing.offsets(2, 32, 64, "shared") == routing.offsets(2, 32, 64, "disjoint") == (0, 32)
    assert routing.offsets(4, 16, 64, "shared") == routing.offsets(4, 16, 64, "disjoint") == (0, 16, 32, 48)
    assert routing.offsets(5, 32, 64, "shared") == (0, 8, 16, 24, 32)
    assert routing.offsets(5, 32, 64, "disjoint") == (0, 32, 64, 96, 128)
    assert routing.offsets(2, 51, 64, "shared") == (0, 13)
    assert routing.offsets(1, 64, 64, "shared") == (0,)


def test_trades():
    clean, adv, y = jnp.array([[2., 0.], [0., 1.]]), jnp.array([[1., 1.], [0., 0.]]), jnp.array([0, 1])
    assert jnp.mean(losses.cross_entropy(clean, y)) == pytest.approx(.2200949, rel=1e-6)
    assert jnp.mean(losses.kl(clean, adv)) == pytest.approx(.2193787, rel=1e-6)
    assert jnp.mean(losses.trades(clean, adv, y, 6.)) == pytest.approx(1.5363672, rel=1e-6)


def test_router_loss_of_the_released_code():
    scores, adv = jnp.array([[1., 0.], [0., 2.]]), jnp.array([[0., 1.], [0., 1.]])
    loss = losses.label_mod(scores[:, None], adv[:, None], jnp.array([3, 8]), 6., 6.)
    assert jnp.mean(loss) == pytest.approx(11.908314, rel=1e-6)
