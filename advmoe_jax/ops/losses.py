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


def best_other(logits: jax.Array, y: jax.Array) -> jax.Array:
    """The largest logit of a class other than y, (B, K), (B,) -> (B,)."""
    is_label = jnp.arange(logits.shape[-1])[None] == y[:, None]
    return jnp.max(jnp.where(is_label, -jnp.inf, logits), -1)


def margin(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Best other logit minus the label's: positive when misclassified, (B, K), (B,) -> (B,)."""
    return best_other(logits, y) - jnp.take_along_axis(logits, y[:, None], -1)[:, 0]


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
