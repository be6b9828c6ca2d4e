"""What a gate and its experts give together.

MoL, Cheng et al., WACVW 2022, after MoRE (arXiv 2104.10586): logits are mixed, not probabilities. B batch, M experts,
K classes.
"""

import jax
import jax.numpy as jnp

COMBINATIONS = ("logits", "log_probabilities", "probabilities")


def mix(expert_logits: jax.Array, gate_logits: jax.Array, *, divide_by_n: bool = False) -> jax.Array:
    """sum_i softmax(gate)_i E_i, (B, M, K) and (B, M) -> (B, K).

    Args:
        expert_logits: of each expert.
        gate_logits: of the gate.
        divide_by_n: whether the sum is divided by M, as one version of the released code does; no class changes, but a
            loss sees a temperature of M.
    """
    mixed = combined(expert_logits, jax.nn.softmax(gate_logits))
    return mixed / expert_logits.shape[1] if divide_by_n else mixed


def combined(expert_logits: jax.Array, weights: jax.Array, how: str = "logits") -> jax.Array:
    """What experts give together by weights that add up to 1, (B, M, K) and (B, M) -> (B, K).

    Args:
        expert_logits: of each expert.
        weights: of each expert, an image.
        how: one of COMBINATIONS. "logits": their mean. "log_probabilities": the logarithm of the mean of the experts'
            probabilities, whose cross-entropy is the mean's. "probabilities": that mean itself, which the released
            simple average takes for logits, so that a second softmax flattens it.
    """
    if how == "logits":
        return jnp.sum(weights[..., None] * expert_logits, 1)
    log_p = jax.nn.log_softmax(expert_logits)
    if how == "probabilities":
        return jnp.sum(weights[..., None] * jnp.exp(log_p), 1)
    return jax.nn.logsumexp(log_p, 1, b=weights[..., None] * jnp.ones_like(log_p))


def taken(gate_logits: jax.Array, count: int, straight: bool = False) -> jax.Array:
    """Weights of all experts, (..., M) -> (..., M), that add up to 1 and are 0 for those that an image does not take.

    Args:
        gate_logits: of the gate.
        count: k, experts that an image takes, of which the largest weights are made to add up to 1; 0: all.
        straight: whether the gradient is that of the weights of all (straight-through). Else it is that of the weights
            that count, of which a single one has none.
    """
    weights = jax.nn.softmax(gate_logits)
    if not count:
        return weights
    chosen, ids = jax.lax.top_k(gate_logits, count)
    found = jnp.sum(jax.nn.softmax(chosen)[..., None] * jax.nn.one_hot(ids, gate_logits.shape[-1]), -2)
    return jax.lax.stop_gradient(found) + (weights - jax.lax.stop_gradient(weights)) if straight else found


def top(gate_logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The experts of the largest weights, and their weights, made to add up to 1.

    Args:
        gate_logits: (B, M).
        count: k of them, from 1 to M.
    Returns:
        (B, k) int32 and (B, k); of equal weights the first.
    """
    chosen, ids = jax.lax.top_k(gate_logits, count)
    return ids.astype(jnp.int32), jax.nn.softmax(chosen)
