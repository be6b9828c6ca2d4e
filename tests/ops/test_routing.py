"""Top-1 routing: values, gradients, windows, mixing and load, against plain numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import routing

STARTS, WIDTH = (0, 2, 5), 3  # three experts of 3 channels in 8, the first two overlap


@pytest.fixture(scope="module")
def case():
    """Scores (B, E), outputs of all channels (B, H, W, C), cotangents (B, H, W, w)."""
    numbers = np.random.default_rng(0)
    return tuple(numbers.standard_normal(shape).astype(np.float32) for shape in ((16, 3), (16, 2, 2, 8), (16, 2, 2, 3)))


def _experts(y):
    """(B, H, W, C) -> (E, B, H, W, w)."""
    return np.stack([y[..., start:start + WIDTH] for start in STARTS])


def _score_gradient(case, grad):
    scores, y, cotangent = case

    def total(scores):
        gate, _ = routing.gates(scores, routing.hard(grad), 0)
        return jnp.sum(cotangent * routing.mix(y, gate, STARTS, WIDTH))

    return jax.grad(total)(scores)


@pytest.mark.parametrize("grad", routing.ROUTER_GRADS)
def test_hard_gates_are_one_hot_bit_for_bit(grad):
    scores = 1e3 * np.random.default_rng(1).standard_normal((256, 5)).astype(np.float32)
    scores[:32] *= 1e-6
    for gates in (routing.gates, jax.jit(routing.gates, static_argnums=2)):
        gate, ids = gates(scores, routing.hard(grad), 0)
        np.testing.assert_array_equal(gate, np.eye(5, dtype=np.float32)[scores.argmax(1)])
        np.testing.assert_array_equal(ids, scores.argmax(1))
        assert ids.dtype == jnp.int32


def test_gradient_of_ste_full_is_the_inner_product_with_every_expert(case):
    _, y, cotangent = case
    expected = np.einsum("bhwc,ebhwc->be", cotangent, _experts(y))
    np.testing.assert_allclose(_score_gradient(case, "ste_full"), expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_ste_selected_is_that_of_the_chosen_expert(case):
    scores, y, cotangent = case
    full = np.einsum("bhwc,ebhwc->be", cotangent, _experts(y))
    expected = full * np.eye(3)[scores.argmax(1)]
    np.testing.assert_allclose(_score_gradient(case, "ste_selected"), expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_scaled_is_that_of_the_output_times_its_relative_probability(case):
    scores, y, cotangent = (a.astype(np.float64) for a in case)
    ids = scores.argmax(1)
    chosen = _experts(y)[ids, np.arange(16)]

    def p(scores):
        e = np.exp(scores)
        return (e / e.sum(1, keepdims=True))[np.arange(16), ids]

    def total(scores):
        return np.einsum("bhwc,bhwc,b->b", cotangent, chosen, p(scores) / p(case[0].astype(np.float64)))

    step = 1e-5
    for e in range(3):
        shift = step * np.eye(3)[e]
        slope = (total(scores + shift) - total(scores - shift)) / (2 * step)
        np.testing.assert_allclose(_score_gradient(case, "scaled")[:, e], slope, rtol=1e-4, atol=1e-5)


def test_gradient_of_none_is_0(case):
    assert not np.any(_score_gradient(case, "none"))


def test_soft_gates(case):
    scores = case[0]
    e = np.exp(scores / 0.7)
    gate, ids = routing.gates(scores, routing.soft(0.7), 0)
    np.testing.assert_allclose(gate, e / e.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(ids, scores.argmax(1))
    cold, _ = routing.gates(scores, routing.soft(1e-4), 0)
    np.testing.assert_allclose(cold, routing.gates(scores, routing.hard(), 0)[0], atol=1e-6)


def test_fixed_gates(case):
    scores = case[0]
    ids = np.arange(32).reshape(16, 2) % 3
    for layer in range(2):
        gate, chosen = routing.gates(scores, routing.fixed(jnp.asarray(ids)), layer)
        np.testing.assert_array_equal(gate, np.eye(3)[ids[:, layer]])
        np.testing.assert_array_equal(chosen, ids[:, layer])
        gate, _ = routing.gates(scores, routing.fixed(jnp.asarray(ids[:, 0])), layer)
        np.testing.assert_array_equal(gate, np.eye(3)[ids[:, 0]])


def test_tokens_choose_one_by_one():
    """Scores (B, T, E); of given routes (B, L) each layer has T."""
    numbers = np.random.default_rng(4)
    scores, ids = numbers.standard_normal((4, 5, 3)).astype(np.float32), numbers.integers(0, 3, (4, 10))
    gate, chosen = routing.gates(scores, routing.hard(), 1)
    np.testing.assert_array_equal(chosen, scores.argmax(-1))
    np.testing.assert_array_equal(gate, np.eye(3)[scores.argmax(-1)])
    for given, expected in ((ids, ids[:, 5:]), (ids[:, 0], np.repeat(ids[:, :1], 5, 1))):
        gate, chosen = routing.gates(scores, routing.fixed(jnp.asarray(given)), 1)
        np.testing.assert_array_equal(chosen, expected)
        np.testing.assert_array_equal(gate, np.eye(3)[expected])


def test_tokens_of_a_layer_are_rows():
    choices = np.arange(2 * 6 * 2).reshape(2, 6, 2)  # two images, two layers of three tokens
    rows = routing.by_layer(choices, 3)
    assert rows.shape == (6, 2, 2)
    np.testing.assert_array_equal(rows[4], choices[1, [1, 4]])
    np.testing.assert_array_equal(routing.by_layer(choices, 1), choices)


def test_unknown_gradient():
    with pytest.raises(UserError, match="ste_full"):
        routing.hard("ste_fool")


@pytest.mark.parametrize("num_experts, scale, channels, shared, disjoint", [
    (2, 0.5, 64, (0, 32), (0, 32)),
    (4, 0.25, 64, (0, 16, 32, 48), (0, 16, 32, 48)),
    (4, 0.25, 10, (0, 3, 5, 8), (0, 2, 4, 6)),
    (10, 0.8, 64, (0, 1, 3, 4, 6, 7, 9, 10, 12, 13), tuple(range(0, 510, 51))),
    (5, 0.5, 64, (0, 8, 16, 24, 32), (0, 32, 64, 96, 128)),
    (1, 0.5, 64, (0,), (0,)),
    (3, 1.0, 16, (0, 0, 0), (0, 16, 32)),
])
def test_windows(num_experts, scale, channels, shared, disjoint):
    width = int(scale * channels)
    assert routing.offsets(num_experts, width, channels, "shared") == shared
    assert routing.offsets(num_experts, width, channels, "disjoint") == disjoint


@pytest.mark.parametrize("num_experts, width, channels", [
    (n, w, c) for n, w, c in itertools.product((2, 3, 4, 5, 7, 10), (1, 5, 8, 12, 31, 51), (8, 15, 64))
    if w <= c <= n * w])
def test_shared_windows_cover_the_channels_evenly(num_experts, width, channels):
    starts = np.array(routing.offsets(num_experts, width, channels, "shared"))
    assert starts[0] == 0 and starts[-1] + width == channels
    assert set(itertools.chain(*(range(s, s + width) for s in starts))) == set(range(channels))
    assert np.ptp(np.diff(starts)) <= 1


def test_mix_is_a_loop_over_images_and_experts(case):
    scores, y, _ = case
    gate = np.asarray(jax.nn.softmax(scores))
    expected = np.zeros((16, 2, 2, WIDTH))
    for b in range(16):
        for e, start in enumerate(STARTS):
            expected[b] += gate[b, e] * y[b, ..., start:start + WIDTH]
    np.testing.assert_allclose(routing.mix(jnp.asarray(y), jnp.asarray(gate), STARTS, WIDTH), expected, atol=1e-6)
    ids = scores.argmax(1)
    chosen = routing.mix(jnp.asarray(y), jnp.eye(3)[ids], STARTS, WIDTH)
    np.testing.assert_array_equal(chosen, _experts(y)[ids, np.arange(16)])


def test_load_counts_images():
    ids = np.random.default_rng(2).integers(0, 4, (50, 3))
    mask = np.arange(50) < 33
    for kept, given in ((ids, None), (ids[mask], jnp.asarray(mask))):
        counts = np.stack([np.bincount(column, minlength=4) for column in kept.T])
        np.testing.assert_array_equal(routing.load(jnp.asarray(ids), 4, given), counts)


def test_load_entropy():
    counts = jnp.array([[5., 5., 5., 5.], [20., 0., 0., 0.], [10., 10., 0., 0.], [0., 0., 0., 0.]])
    np.testing.assert_allclose(routing.load_entropy(counts), [1, 0, 0.5, 0], atol=1e-6)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    assert routing.load_entropy(jnp.asarray(16 * p)) == pytest.approx(-(p * np.log(p)).sum() / np.log(4), rel=1e-5)


def test_balance_loss():
    """1 when even, E when collapsed, and between for everything whose fractions agree with its probabilities."""
    num_experts = 4
    even = 50 * jnp.eye(num_experts)[jnp.arange(32) % num_experts][:, None]
    collapsed = 50 * jnp.eye(num_experts)[jnp.zeros(32, int)][:, None]
    assert routing.balance_loss(even) == pytest.approx(1, rel=1e-5)
    assert routing.balance_loss(collapsed) == pytest.approx(num_experts, rel=1e-5)
    assert routing.balance_loss(jnp.concatenate([even, collapsed], 1)) == pytest.approx((1 + num_experts) / 2, rel=1e-5)
    scores = np.random.default_rng(3).standard_normal((64, 5, num_experts)).astype(np.float32)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    fraction = np.eye(num_experts)[scores.argmax(-1)].mean(0)
    expected = num_experts * (fraction * p.mean(0)).sum(-1).mean()
    assert routing.balance_loss(jnp.asarray(scores)) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected <= num_experts


def test_tokens_share_one_load():
    """It is even in each image where every token of it always takes the same expert, another one than its neighbour."""
    scores = 50 * jnp.eye(2)[jnp.arange(8) % 2][None].repeat(16, 0)
    assert routing.balance_loss(scores, tokens=8) == pytest.approx(1, rel=1e-5)
    assert routing.balance_loss(scores, tokens=4) == pytest.approx(1, rel=1e-5)
    assert routing.balance_loss(scores) == pytest.approx(2, rel=1e-5)


def test_balance_loss_moves_the_scores_of_a_full_expert_down():
    scores = jnp.array([[1., 0.]] * 8)[:, None]
    gradient = np.asarray(jax.grad(routing.balance_loss)(scores))[:, 0]
    assert np.all(gradient[:, 0] > 0) and np.all(gradient[:, 1] < 0)
