"""When enough members of a team have been asked: the Dynamic Inference Ensemble of EED.

Jung & Song, CVPR 2025, eq. 20 to 22 and 26 to 31. Members are asked one after the other; after t of them the team's
answer is the mean of their probabilities, which it gives at stage t with probability q_t if it has not before. Of eq.
31 only words are known: the answer should be sure, and no other than a member ago.

B batch, M members, K classes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import one_of

GATES = ("product", "agreeing", "thresholds", "sigmoid")
COMBINERS = ("mean", "max")
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Rule:
    """How q_t comes from confidence C_t, the square of the largest probability, and change U_t, KL(answer t || t - 1).

    Attributes:
        gate: "product": C exp(-U). "agreeing": C where U is below `most_change`, else 0. "thresholds": 1 where that
            holds and C is `least_confidence` or more, else 0. "sigmoid": sigmoid(slope (C - U - least_confidence));
            with 0 for that every team would stop at its first member, since U_1 is 0.
        most_change, least_confidence: thresholds of these gates.
        slope: of "sigmoid".
        combiner: "mean" of the members' probabilities; or "max", the largest of each class, scaled to sum 1.
    """

    gate: str = "product"
    most_change: float = 0.1
    least_confidence: float = 0.5
    slope: float = 10.0
    combiner: str = "mean"

    def __post_init__(self):
        one_of("gate", self.gate, GATES)
        one_of("combiner", self.combiner, COMBINERS)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("q", "p", "z", "probabilities"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Stop:
    """Where a team stops.

    Attributes:
        q: (B, M), q_t = P(z = t | z >= t).
        p: (B, M), P(z = t). Its sum and the product of all 1 - q are 1.
        z: (B,) int32, the most probable stage, counted from 1; of equal ones the first.
        probabilities: (B, K), the answer after z members.
    """

    q: jax.Array
    p: jax.Array
    z: jax.Array
    probabilities: jax.Array


def answers(probabilities: jax.Array, combiner: str = "mean") -> jax.Array:
    """The team's answer after each member, eq. 20: (B, M, K) -> (B, M, K). One member after the other is added, so that
    the first answers do not depend on how many are asked."""
    found, total = [], None
    for t in range(probabilities.shape[1]):
        new = probabilities[:, t]
        if combiner == "max":
            total = new if total is None else jnp.maximum(total, new)
            found.append(total / jnp.sum(total, -1, keepdims=True))
        else:
            total = new if total is None else total + new
            found.append(total / (t + 1))
    return jnp.stack(found, 1)


def stop(probabilities: jax.Array, rule: Rule = Rule()) -> Stop:
    """Where the members' probabilities (B, M, K) let a team stop, eq. 21 and 22.

    U_1 is 0. Where a gate is shut at every stage the team stops at the last one: q_M is 1 there.
    """
    means = answers(probabilities, rule.combiner)
    q = _gates(means, rule)
    q = q.at[:, -1].set(jnp.where(jnp.all(q == 0, -1), 1, q[:, -1]))
    p, _ = _stages(q)
    z = jnp.argmax(p, -1).astype(jnp.int32) + 1
    return Stop(q, p, z, jnp.take_along_axis(means, z[:, None, None] - 1, 1)[:, 0])


def expected(probabilities: jax.Array, rule: Rule = Rule()) -> jax.Array:
    """The answer in expectation over the stage, (B, M, K) -> (B, K): what an attack can follow where `stop` jumps.

    Sum of P(z = t) times answer t, over the sum of P(z = t), since a team may stop nowhere.
    """
    p = stop(probabilities, rule).p
    weights = p / jnp.maximum(jnp.sum(p, -1, keepdims=True), _TINY)
    return jnp.einsum("bm,bmk->bk", weights, answers(probabilities, rule.combiner))


def is_over(probabilities: jax.Array, rule: Rule = Rule()) -> jax.Array:
    """Whether those asked so far suffice, (B, t, K) -> (B,) bool: no later member can change where the team stops.

    As soon as the largest P(z = i) is at least the product S_t of all 1 - q_i: later P(z = k) are at most S_{k - 1},
    which is at most S_t.
    """
    p, left = _stages(_gates(answers(probabilities, rule.combiner), rule))
    return jnp.max(p, -1) >= left[:, -1]


def asked(probabilities: jax.Array, rule: Rule = Rule()) -> jax.Array:
    """How many members must be asked to know where `stop` stops, (B, M, K) -> (B,) int32, z or more. See `is_over`."""
    p, left = _stages(_gates(answers(probabilities, rule.combiner), rule))
    over = jax.lax.cummax(p, 1) >= left
    return jnp.argmax(over.at[:, -1].set(True), -1).astype(jnp.int32) + 1


def _gates(means, rule):
    """(B, M) of answers (B, M, K)."""
    confidence = jnp.square(jnp.max(means, -1))
    log = jnp.log(jnp.maximum(means, _TINY))
    change = jnp.maximum(jnp.sum(means[:, 1:] * (log[:, 1:] - log[:, :-1]), -1), 0)
    change = jnp.concatenate([jnp.zeros_like(confidence[:, :1]), change], 1)
    agrees = (change < rule.most_change).astype(means.dtype)
    q = {"product": lambda: confidence * jnp.exp(-change), "agreeing": lambda: confidence * agrees,
         "thresholds": lambda: agrees * (confidence >= rule.least_confidence),
         "sigmoid": lambda: jax.nn.sigmoid(rule.slope * (confidence - change - rule.least_confidence))}[rule.gate]()
    return jnp.clip(q, 0, 1)


def _stages(q):
    """(B, M) P(z = t), and the products S_t of the first 1 - q."""
    left, found, kept = jnp.ones_like(q[:, 0]), [], []
    for t in range(q.shape[1]):
        found.append(q[:, t] * left)
        left = left * (1 - q[:, t])
        kept.append(left)
    return jnp.stack(found, 1), jnp.stack(kept, 1)
