"""Attacks that know of the members of an ensemble, evaluated as far as needed (early exits).

Verdicts are those of the ensemble's own rule. B images, M members or exits, K classes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives, structured
from advmoe_jax.attacks.about import About
from advmoe_jax.attacks.objectives import Objective
from advmoe_jax.core.errors import one_of
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls, losses

ABOUT = About(balls.NORMS, takes="outputs", needs=("member_logits",))
_SURE, _TEMPERATURE = 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class Config(structured.Settings):
    """Settings of an attack on an ensemble.

    Attributes:
        mode: "average": the loss of the mean of the members' logits.
            "probabilities": the loss of the mean of their probabilities.
            "each": the mean of the members' losses.
            "best": the smallest of the members' losses, so that every member has to fail.
            "soft": the loss of the mean of their probabilities, weighted by how likely each exit is. A sigmoid of its
            confidence minus 0.8, at temperature 0.1, stands for the rule.
            "member": the loss of one member after the other.
            "force": confidence in a wrong class at the first exit, so that no other member is asked.
            "delay": the entropy of all exits, so that every member is used. That raises the cost; the attack succeeds
            only where the prediction is wrong too.
        others: see structured.Settings.
    """

    mode: str = setting("average", "of the members' losses", read=lambda mode, what: one_of(what, mode, MODES))


label = structured.label


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(outputs_fn, key, x, y) -> x_adv`; errors as pgd.make.

    `outputs_fn` is `x -> (logits, aux)`, the logits by the ensemble's own rule and aux["member_logits"] (B, M, K).
    """
    def begin(inputs):
        x = inputs.rows["x"]
        [logits] = structured.needed("exits", ABOUT, jax.eval_shape(inputs.logits_fn, x)[1])
        objective = Objective(_LOSSES[config.mode], _succeeds)
        runs = [[structured.Phase(objective, functools.partial(_aimed, number))]
                for number in range(logits.shape[1] if config.mode == "member" else 1)]
        return inputs, driver.none_yet(x), runs

    return structured.attack_by("exits", config, ABOUT, begin, stops=config.early_stop)


def _aimed(number, rows):
    return rows | {"y": (rows["y"], jnp.full(rows["x"].shape[0], number))}


# What is raised. y is (labels (B,), numbers of a member (B,)).


def _surprise(log_p, y):
    return -jnp.take_along_axis(log_p, y[0][:, None], -1)[:, 0]


def _probabilities(outputs, y):
    log_p = jax.nn.log_softmax(outputs[1]["member_logits"])
    return _surprise(jax.nn.logsumexp(log_p, 1) - jnp.log(log_p.shape[1]), y)


def _losses(outputs, y):
    """(B, M)."""
    return jax.vmap(losses.cross_entropy, (1, None), 1)(outputs[1]["member_logits"], y[0])


def _soft(outputs, y):
    log_p = jax.nn.log_softmax(outputs[1]["member_logits"])
    leave = (jnp.exp(jnp.max(log_p, -1)) - _SURE) / _TEMPERATURE
    stay = jnp.cumsum(jax.nn.log_sigmoid(-leave), 1)
    reached = jnp.concatenate([jnp.zeros_like(stay[:, :1]), stay[:, :-1]], 1)
    weights = reached + jax.nn.log_sigmoid(leave).at[:, -1].set(0)  # the last member always answers
    return _surprise(jax.nn.logsumexp(weights[..., None] + log_p, 1), y)


def _member(outputs, y):
    logits = outputs[1]["member_logits"]
    return losses.cross_entropy(jnp.take_along_axis(logits, y[1][:, None, None], 1)[:, 0], y[0])


def _delay(outputs, y):
    log_p = jax.nn.log_softmax(outputs[1]["member_logits"])
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1), -1)


def _succeeds(outputs, y):
    return objectives.misclassified(outputs[0], y[0])


_LOSSES = {
    "average": lambda outputs, y: losses.cross_entropy(jnp.mean(outputs[1]["member_logits"], 1), y[0]),
    "probabilities": _probabilities,
    "each": lambda outputs, y: jnp.mean(_losses(outputs, y), -1),
    "best": lambda outputs, y: jnp.min(_losses(outputs, y), -1),
    "soft": _soft, "member": _member,
    "force": lambda outputs, y: losses.best_other(jax.nn.log_softmax(outputs[1]["member_logits"][:, 0]), y[0]),
    "delay": _delay}
MODES = tuple(_LOSSES)
