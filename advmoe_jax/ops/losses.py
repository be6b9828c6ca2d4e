"""Losses, one value per example. B batch, K classes; the mean over a batch is taken by the caller."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """(B, K), (B,) labels -> (B,)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1)[:, 0]


def kl(p_logits: jax.Array, q_logits: jax.Array) -> jax.Array:
    """KL(p || q) between softmax distributions, (B, K), (B, K) -> (B,). Gradients flow to both."""
    log_p = jax.nn.log_softmax(p_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - jax.nn.log_softmax(q_logits)), -1)


def others(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The logits with -inf in place of the label's, (B, K), (B,) -> (B, K)."""
    return jnp.where(jnp.arange(logits.shape[-1])[None] == y[:, None], -jnp.inf, logits)


def best_other(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The largest logit of a class other than y, (B, K), (B,) -> (B,)."""
    return jnp.max(others(logits, y), -1)


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
    top = jax.lax.top_k(logits, 3)[0]
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: jax.Array, y: jax.Array, target: jax.Array) -> jax.Array:
    """(z_target - z_y) / (z1 - (z3 + z4) / 2) of the sorted logits, (B, K), (B,), (B,) -> (B,).

    With three classes z4 is z3, with two the denominator is 1. Croce & Hein, ICML 2020, eq. 7.
    """
    difference = margin_to(logits, y, target)
    if logits.shape[-1] < 3:
        return difference
    top = jax.lax.top_k(logits, min(4, logits.shape[-1]))[0]
    return difference / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)


def margin_to(logits: jax.Array, y: jax.Array, target: jax.Array) -> jax.Array:
    """A target's logit minus the label's, (B, K), (B,), (B,) -> (B,)."""
    return (jnp.take_along_axis(logits, target[:, None], -1) - jnp.take_along_axis(logits, y[:, None], -1))[:, 0]


def trades(clean: jax.Array, adv: jax.Array, y: jax.Array, beta: float) -> jax.Array:
    """CE(clean, y) + beta * KL(clean || adv), beta = 1 / lambda; Zhang et al., ICML 2019, eq. 5."""
    return cross_entropy(clean, y) + beta * kl(clean, adv)


def mart(clean: jax.Array, adv: jax.Array, y: jax.Array, beta: float) -> jax.Array:
    """BCE(adv, y) + beta * KL(clean || adv) * (1 - p_clean(y)); Wang et al., ICLR 2020, eq. 9.

    BCE is the boosted cross-entropy CE(adv, y) - log(1 - max of p_adv over the other classes), eq. 8.
    """
    log_other = best_other(jax.nn.log_softmax(adv), y)
    boosted = cross_entropy(adv, y) - jnp.log1p(-jnp.exp(jnp.minimum(log_other, -1e-6)))
    return boosted + beta * kl(clean, adv) * (1 - jnp.exp(-cross_entropy(clean, y)))


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
    target = jnp.repeat((y % scores.shape[-1])[:, None], scores.shape[1], 1)
    log_p = jax.nn.log_softmax(scores)
    ce = -jnp.take_along_axis(log_p, target[..., None], -1)[..., 0]
    return jnp.mean(alpha * ce + beta * kl(scores, adv_scores), -1)
