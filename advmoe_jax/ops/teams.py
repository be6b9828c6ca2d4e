"""Losses of networks that are trained as a team, one value per example unless said.

B batch, M members, K classes; h probabilities (B, M, K), y labels (B,).
"""

import jax
import jax.numpy as jnp

from advmoe_jax.ops import losses

_MOST_WRONG = 0.99
FORMS = ("largest", "each", "any_class")


def misclassified(h: jax.Array, y: jax.Array, form: str = "largest") -> jax.Array:
    """EED's L_R (Jung & Song, CVPR 2025, eq. 15), after iGAT (Deng & Mu, NeurIPS 2023): (B,), 0 where the mean of h is
    right.

    -log(1 - p) of the largest probability p that a member gives a wrong class. The value is that of p = 0.99 where p is
    larger, and the gradient too, so that the worst images count.

    Args:
        h, y: of a batch.
        form: "largest", of all members; "each", the sum over the members of that of their own; "any_class", the largest
            of all classes, the right one too, as the equation is printed.
    """
    wrong = jax.lax.stop_gradient(jnp.argmax(jnp.mean(h, 1), -1) != y)
    others = h if form == "any_class" else jnp.where(jnp.arange(h.shape[-1])[None, None] == y[:, None, None], 0, h)
    p = jnp.max(others, -1)
    p = p if form == "each" else jnp.max(p, -1, keepdims=True)
    p = p + jax.lax.stop_gradient(jnp.minimum(p, _MOST_WRONG) - p)
    return jnp.where(wrong, jnp.sum(-jnp.log1p(-p), -1), 0)


def adp(h: jax.Array, y: jax.Array, alpha: float = 2.0, beta: float = 0.5) -> jax.Array:
    """ADP's regularizer (Pang et al., ICML 2019), to be added to the members' cross-entropies: (B,).

    -alpha * entropy of the mean - beta * log det of the members' wrong classes, as unit vectors, with 1e-6 on the
    diagonal.
    """
    mean = jnp.mean(h, 1)
    entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-20)), -1)
    wrong = jnp.where(jnp.arange(h.shape[-1])[None, None] == y[:, None, None], 0, h)
    unit = wrong / jnp.sqrt(jnp.sum(jnp.square(wrong), -1, keepdims=True) + 1e-20)
    gram = jnp.einsum("bmk,bnk->bmn", unit, unit) + 1e-6 * jnp.eye(h.shape[1])[None]
    return -alpha * entropy - beta * jnp.linalg.slogdet(gram)[1]


def gal(gradients: jax.Array) -> jax.Array:
    """GAL's coherence (Kariyappa & Qureshi, 2019): log of the sum over pairs of exp(cosine of their gradients), (B,).

    Args:
        gradients: (B, M, D) of the members' losses with respect to the image.
    """
    unit = gradients / jnp.sqrt(jnp.sum(jnp.square(gradients), -1, keepdims=True) + 1e-20)
    cosine = jnp.einsum("bmd,bnd->bmn", unit, unit)
    first, second = jnp.triu_indices(gradients.shape[1], 1)
    return jax.nn.logsumexp(cosine[:, first, second], -1)


def soe(confidence: jax.Array, logits: jax.Array, y: jax.Array, sigma: float = 1.0) -> jax.Array:
    """SoE's loss of attacked images (Cui et al., "Synergy-of-Experts", NeurIPS 2022; EED's eq. 35): (B,).

    Each member says how probable it holds the right class to be, and the one that holds it to be most probable has most
    to learn: the binary cross-entropies of what they say, summed, and the soft minimum over the members of their
    cross-entropies, -sigma * ln(sum of exp(-CE / sigma)). What should be said is a constant, as in the released code.

    Args:
        confidence: (B, M), logits of what the members say.
        logits: (B, M, K) of the members.
        y: labels (B,).
        sigma: temperature of the soft minimum, above 0; towards 0 it is the least cross-entropy.
    """
    surprise = jax.vmap(losses.cross_entropy, (1, None), 1)(logits, y)
    right = jnp.exp(-jax.lax.stop_gradient(surprise))
    said = jax.nn.softplus(confidence) - right * confidence
    return jnp.sum(said, -1) - sigma * jax.nn.logsumexp(-surprise / sigma, -1)
