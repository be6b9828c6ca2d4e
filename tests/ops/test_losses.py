"""Losses against plain numpy, and where their gradients flow."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.ops import losses


@pytest.fixture(scope="module")
def case():
    """Clean and adversarial logits (B, K), labels (B,)."""
    numbers = np.random.default_rng(0)
    clean, adv = (3 * numbers.standard_normal((32, 5)).astype(np.float32) for _ in range(2))
    return clean, adv, numbers.integers(0, 5, 32)


def _p(logits):
    e = np.exp(np.asarray(logits, np.float64))
    return e / e.sum(-1, keepdims=True)


def _kl(a, b):
    return (_p(a) * np.log(_p(a) / _p(b))).sum(-1)


def _close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)


def test_cross_entropy(case):
    clean, _, y = case
    _close(losses.cross_entropy(clean, y), [-np.log(_p(z)[k]) for z, k in zip(clean, y)])


def test_kl(case):
    clean, adv, _ = case
    _close(losses.kl(clean, adv), _kl(clean, adv))
    _close(losses.kl(clean, clean), 0)
    assert np.all(losses.kl(clean, adv) > 0)


def test_kl_has_gradients_to_both(case):
    clean, adv, _ = case
    to_p, to_q = jax.grad(lambda a, b: jnp.sum(losses.kl(a, b)), argnums=(0, 1))(clean, adv)
    p, q = _p(clean), _p(adv)
    _close(to_q, q - p)
    log_ratio = np.log(p / q)
    _close(to_p, p * (log_ratio - (p * log_ratio).sum(-1, keepdims=True)))


def test_margin(case):
    clean, _, y = case
    _close(losses.margin(clean, y), [max(np.delete(z, k)) - z[k] for z, k in zip(clean, y)])
    np.testing.assert_array_equal(losses.margin(clean, y) > 0, clean.argmax(-1) != y)


def test_trades(case):
    clean, adv, y = case
    ce = -np.log(_p(clean)[np.arange(32), y])
    _close(losses.trades(clean, adv, y, 6.), ce + 6 * _kl(clean, adv))


def test_mart(case):
    clean, adv, y = case
    p, q, rows = _p(clean), _p(adv), np.arange(32)
    other = np.array([max(np.delete(row, k)) for row, k in zip(q, y)])
    boosted = -np.log(q[rows, y]) - np.log(1.0001 - other)
    _close(losses.mart(clean, adv, y, 6.), boosted + 6 * _kl(clean, adv) * (1 - p[rows, y]))


def test_mart_of_saturated_logits_has_the_guard_of_its_authors():
    """Another class at probability 1 costs -log 0.0001, and no more."""
    clean, adv = np.float32([[0, 0, 0, 0], [25, 0, 0, 0]]), np.float32([[0, 30, 0, 0], [0, 60, 0, 0]])
    cross_entropies, kls = np.float64([30, 60]), np.float64([22.5 - np.log(4), 60])
    wrong = 1 - np.float64([.25, 1 / (1 + 3 * np.exp(-25))])
    expected = cross_entropies - np.log(.0001) + 6 * kls * wrong
    y = np.zeros(2, int)
    for labels in (y, losses.one_hot(y, 4)):
        _close(losses.mart(clean, adv, labels, 6.), expected)


def test_label_mod():
    numbers = np.random.default_rng(1)
    scores, adv = (numbers.standard_normal((8, 3, 2)).astype(np.float32) for _ in range(2))
    y = np.arange(8)
    expected = np.zeros(8)
    for b in range(8):
        for layer in range(3):
            expected[b] += (-2 * np.log(_p(scores[b, layer])[y[b] % 2]) + 5 * _kl(scores[b, layer], adv[b, layer])) / 3
    _close(losses.label_mod(scores, adv, y, 2., 5.), expected)


@pytest.mark.parametrize("name", ["trades", "mart"])
def test_gradients_flow_through_both_forward_passes(case, name):
    clean, adv, y = case
    loss = getattr(losses, name)
    for gradient in jax.grad(lambda a, b: jnp.sum(loss(a, b, y, 6.)), argnums=(0, 1))(clean, adv):
        assert np.all(np.abs(gradient).max(-1) > 1e-6)


@pytest.mark.parametrize("size", [30., 1e3, 1e6])
def test_confident_logits_give_finite_losses_and_gradients(size):
    clean = size * jnp.array([[1., 0., 0.], [0., 1., 0.], [0., 0., 1.]])
    adv, y = clean[:, ::-1], jnp.array([0, 1, 0])

    def routers(clean, adv, y, beta):
        return losses.label_mod(clean[:, None], adv[:, None], y, beta, beta)

    for loss in (losses.trades, losses.mart, routers):
        value, gradients = jax.value_and_grad(lambda a, b: jnp.sum(loss(a, b, y, 6.)), argnums=(0, 1))(clean, adv)
        assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradients)


def test_gradients_of_labels_keep_their_bits(case):
    """Of eq. 9 in one expression: a gradient is a sum over the uses of the logits, and rounds as they are ordered."""
    def plain(clean, adv, y, beta):
        log_other = losses.best_other(jax.nn.log_softmax(adv), y)
        boosted = losses.cross_entropy(adv, y) - jnp.log(1.0001 - jnp.exp(log_other))
        return boosted + beta * losses.kl(clean, adv) * (1 - jnp.exp(-losses.cross_entropy(clean, y)))

    clean, adv, y = case
    ours, expected = (
        jax.jit(jax.value_and_grad(lambda a, b, loss=loss: jnp.sum(loss(a, b, y, 6.)), (0, 1)))(clean, adv)
        for loss in (losses.mart, plain))
    chex.assert_trees_all_equal(ours, expected)


@pytest.fixture(scope="module")
def soft():
    """Soft labels (B, K)."""
    return np.random.default_rng(2).dirichlet(np.ones(5), 32).astype(np.float32)


def test_one_hot_and_hard():
    y = jnp.array([2, 0])
    chex.assert_trees_all_equal(losses.one_hot(y, 3), jnp.array([[0., 0., 1.], [1., 0., 0.]]))
    chex.assert_trees_all_close(losses.one_hot(y, 4, 0.2), jnp.array([[.05, .05, .85, .05], [.85, .05, .05, .05]]))
    chex.assert_trees_all_equal(losses.hard(losses.one_hot(y, 4, 0.2)), y)
    assert losses.hard(y) is y


def test_soft_labels_by_hand():
    """p_clean = (1/4, 1/4, 1/2), p_adv = (1/8, 1/8, 3/4), y = (1/2, 0, 1/2)."""
    clean, adv = jnp.log(jnp.array([[1., 1., 2.]])), jnp.log(jnp.array([[1., 1., 6.]]))
    y = jnp.array([[.5, 0., .5]])
    ce_clean, ce_adv = 1.5 * np.log(2), .5 * np.log(8) + .5 * np.log(4 / 3)
    kl = .5 * np.log(2) + .5 * np.log(2 / 3)
    boosted = ce_adv - .5 * np.log(1.0001 - .75) - .5 * np.log(1.0001 - .125)
    _close(losses.cross_entropy(clean, y), [ce_clean])
    _close(losses.trades(clean, adv, y, 6.), [ce_clean + 6 * kl])
    _close(losses.mart(clean, adv, y, 6.), [boosted + 6 * kl * (1 - 3 / 8)])


@pytest.mark.parametrize("name", ["cross_entropy", "trades", "mart"])
def test_soft_labels_are_an_expectation_of_labels(name, case, soft):
    """Of the loss; of MART's the parts are linear in y too."""
    clean, adv, y = case
    rest = () if name == "cross_entropy" else (adv,)
    weights = () if name == "cross_entropy" else (6.,)
    loss = getattr(losses, name)
    each = np.stack([loss(clean, *rest, np.full(32, k), *weights) for k in range(5)], 1)
    _close(loss(clean, *rest, soft, *weights), (soft * each).sum(1))
    _close(loss(clean, *rest, losses.one_hot(y, 5), *weights), loss(clean, *rest, y, *weights))


def test_gradients_of_soft_labels_are_finite(soft):
    y = jnp.asarray(soft[:3, :3] / soft[:3, :3].sum(1, keepdims=True))
    for size in (0., 1., 1e3, 1e6):  # all logits equal, and ever surer ones
        clean = size * jnp.eye(3)
        for adv in (clean, clean[:, ::-1]):
            for loss in (losses.trades, losses.mart):
                chex.assert_tree_all_finite(
                    jax.value_and_grad(lambda a, b: jnp.sum(loss(a, b, y, 6.)), argnums=(0, 1))(clean, adv))


def test_label_smoothing_pulls_confident_logits_back():
    logits = jnp.array([[9., 0., 0.]])
    gradient = jax.grad(lambda z: losses.cross_entropy(z, losses.one_hot(jnp.array([0]), 3, .3))[0])(logits)
    _close(gradient, _p(logits) - [[.8, .1, .1]])


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "dlr", "best_other"])
@pytest.mark.parametrize("y", [np.zeros(31, int), np.zeros((32, 4)), np.zeros(32), np.zeros((32, 1), int)])
def test_labels_of_another_shape_or_type_are_refused(name, y, case):
    with pytest.raises(AssertionError):
        getattr(losses, name)(case[0], y)


def test_other_shapes_are_refused(case, soft):
    clean, adv, y = case
    for call in (lambda: losses.kl(clean, adv[:, :4]), lambda: losses.kl(clean, adv[:1]),
                 lambda: losses.trades(clean, adv[:, :4], y, 6.), lambda: losses.mart(clean, adv, soft[:, :4], 6.),
                 lambda: losses.margin(clean, soft), lambda: losses.margin_to(clean, y, y[:4]),
                 lambda: losses.cross_entropy(clean[0], y[:1]), lambda: losses.label_mod(clean, adv, y, 1., 1.),
                 lambda: losses.one_hot(soft, 5)):
        with pytest.raises(AssertionError):
            call()


def test_a_masked_class_changes_no_difference_of_logits(case):
    """-inf in its place is as if the class were not there; and gradients are finite, also of losses that aim at it."""
    clean, _, y = case[0], case[1], case[2] % 4
    masked = jnp.asarray(clean).at[:, 4].set(-jnp.inf)
    for loss in (losses.margin, losses.dlr):
        _close(loss(masked, y), loss(clean[:, :4], y))
    _close(losses.margin_to(masked, y, (y + 1) % 4), losses.margin_to(clean, y, (y + 1) % 4))
    for loss in (losses.margin, losses.dlr, losses.cross_entropy, lambda z, y: losses.margin_to(z, y, y * 0 + 4),
                 lambda z, y: losses.dlr_targeted(z, y, y * 0 + 4)):
        chex.assert_tree_all_finite(jax.value_and_grad(lambda z, loss=loss: jnp.sum(loss(z, y)))(masked))
