"""Losses, one value per example. B batch, K classes; the mean over a batch is taken by the caller.

`y` is (B,) integer labels. `cross_entropy`, `trades` and `mart` also take soft labels, (B, K) probabilities, as label
smoothing, mixup and CutMix make them. An array of another shape is an AssertionError.
"""

import chex
import jax
import jax.numpy as jnp


def one_hot(y: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """Labels as probabilities, (B,) -> (B, K) float32: 1 - smoothing for the label plus smoothing / K for every class.

    Szegedy et al., CVPR 2016, sec. 7.

    Args:
        y: labels.
        num_classes: K.
        smoothing: 0 (none) to 1.
    """
    chex.assert_rank(y, 1)
    return (1 - smoothing) * jax.nn.one_hot(y, num_classes, dtype=jnp.float32) + smoothing / num_classes


def hard(y: jax.Array) -> jax.Array:
    """The most probable class of soft labels, (B, K) -> (B,); labels stay as they are."""
    return jnp.argmax(y, -1) if y.ndim == 2 else y


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k y_k log p_k, (B, K), (B,) labels or (B, K) soft labels -> (B,)."""
    log_p = jax.nn.log_softmax(logits)
    if y.ndim == 2:
        chex.assert_equal_shape((logits, y))
        return -jnp.sum(y * log_p, -1)
    _check(logits, y)
    return -jnp.take_along_axis(log_p, y[:, None], -1)[:, 0]


def kl(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
    """KL(p || q) between softmax distributions, (..., K), (..., K) -> (...). Gradients flow to both."""
    chex.assert_equal_shape((p_logits, q_logits))
    log_p = jax.nn.log_softmax(p_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(q_logits)), -1)


def others(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The logits with -inf in place of the label's, (B, K), (B,) -> (B, K)."""
    _check(logits, y)
    return jnp.where(jnp.arange(logits.shape[-1])[None] == y[:, None], -jnp.inf, logits)


def best_other(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The largest logit of a class other than y, (B, K), (B,) -> (B,)."""
    return jnp.max(others(logits, y), -1)


def unmasked(logits: jax.Array) -> jax.Array:
    """The logits (B, K) with the least finite one of the row in place of -inf, which masks a class.

    No margin changes unless all other classes are masked, and what goes on with differences of logits stays finite.
    """
    is_masked = jnp.isneginf(logits)
    least = jnp.min(jnp.where(is_masked, jnp.inf, logits), -1, keepdims=True)
    return jnp.where(is_masked, jax.lax.stop_gradient(least), logits)


def margin(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Best other logit minus the label's: positive when misclassified, (B, K), (B,) -> (B,)."""
    return best_other(logits, y) - jnp.take_along_axis(logits, y[:, None], -1)[:, 0]


def dlr(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Difference of logits ratio, (B, K), (B,) -> (B,): the margin over z1 - z3 of the sorted logits.

    It does not change when the logits are scaled or shifted. With two classes, where there is no z3, it is the margin.
    Croce & Hein, ICML 2020, eq. 6.
    """
    if logits.shape[-1] < 3:
        return margin(logits, y)
    top = jax.lax.top_k(unmasked(logits), 3)[0]
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: jax.Array, y: jax.Array, target: jax.Array) -> jax.Array:
    """(z_target - z_y) / (z1 - (z3 + z4) / 2) of the sorted logits, (B, K), (B,), (B,) -> (B,).

    With three classes z4 is z3, with two the denominator is 1. Croce & Hein, ICML 2020, eq. 7.
    """
    difference = margin_to(logits, y, target)
    if logits.shape[-1] < 3:
        return difference
    top = jax.lax.top_k(unmasked(logits), min(4, logits.shape[-1]))[0]
    return difference / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)


def margin_to(logits: jax.Array, y: jax.Array, target: jax.Array) -> jax.Array:
    """A target's logit minus the label's, (B, K), (B,), (B,) -> (B,)."""
    _check(logits, y, target)
    logits = unmasked(logits)
    return (jnp.take_along_axis(logits, target[:, None], -1) - jnp.take_along_axis(logits, y[:, None], -1))[:, 0]


def trades(clean: jax.Array, adv: jax.Array, y: jax.Array, beta: float) -> jax.Array:
    """CE(clean, y) + beta * KL(clean || adv), beta = 1 / lambda, y hard or soft; Zhang et al., ICML 2019, eq. 5."""
    return cross_entropy(clean, y) + beta * kl(clean, adv)


def mart(clean: jax.Array, adv: jax.Array, y: jax.Array, beta: float) -> jax.Array:
    """BCE(adv, y) + beta * KL(clean || adv) * (1 - p_clean(y)); Wang et al., ICLR 2020, eq. 9.

    BCE is the boosted cross-entropy CE(adv, y) - log(1.0001 - max of p_adv over the other classes), eq. 8 with the
    guard of the authors' code. With soft labels BCE and p_clean(y) are expectations over y ~ soft labels.
    """
    # Gradients are added up in the reverse order of what follows: another order is another rounding.
    log_other = _log_other(jax.nn.log_softmax(adv), y)
    boosted = cross_entropy(adv, y) - _expected(jnp.log(1.0001 - jnp.exp(log_other)), y)
    return boosted + beta * kl(clean, adv) * (1 - _probability(clean, y))


def _log_other(log_p: jax.Array, y: jax.Array) -> jax.Array:
    """The largest log p of another class: (B,) for labels; for soft labels (B, K), of each class."""
    if y.ndim == 1:
        return best_other(log_p, y)
    top, classes = jax.lax.top_k(log_p, 2)
    return jnp.where(jnp.arange(log_p.shape[-1])[None] == classes[:, :1], top[:, 1:], top[:, :1])


def _probability(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.exp(-cross_entropy(logits, y)) if y.ndim == 1 else _expected(jax.nn.softmax(logits), y)


def _expected(values: jax.Array, y: jax.Array) -> jax.Array:
    return values if y.ndim == 1 else jnp.sum(y * values, -1)


def _check(logits: jax.Array, *labels: jax.Array) -> None:
    for y in labels:
        chex.assert_rank((logits, y), (2, 1))
        chex.assert_equal_shape_prefix((logits, y), 1)
        chex.assert_type(y, int)


def label_mod(scores: jax.Array, adv_scores: jax.Array, y: jax.Array, alpha: float, beta: float) -> jax.Array:
    """The released AdvMoE code's router loss: the router is a classifier of y modulo E.

    alpha * CE(scores, y mod E) + beta * KL(scores || adv_scores), mean over the L choices. Labels steer the
    routing; the paper does not do this.

    Args:
        scores, adv_scores: (B, L, E) router logits on clean and adversarial images.
        y: (B,) labels.
    Returns:
        (B,).
    """
    chex.assert_rank((scores, y), (3, 1))
    target = jnp.repeat((y % scores.shape[-1])[:, None], scores.shape[1], 1)
    log_p = jax.nn.log_softmax(scores)
    ce = -jnp.take_along_axis(log_p, target[..., None], -1)[..., 0]
    return jnp.mean(alpha * ce + beta * kl(scores, adv_scores), -1)
