"""Attacks that know of the members of an ensemble, evaluated as far as needed (early exits).

Verdicts are those of the ensemble's own rule. B images, M members or exits, K classes.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, objectives, pgd, settings
from advmoe_jax.attacks.objectives import Objective
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.ops import balls, losses

NORMS = balls.NORMS
TAKES = "outputs"  # see parse.Spec
_SURE, _TEMPERATURE = 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of an attack on an ensemble.

    Attributes:
        mode: "average": the loss of the mean of the members' logits.
            "probabilities": the loss of the mean of their probabilities.
            "each": the mean of the members' losses.
            "best": the least of the members' losses, so that every member falls.
            "soft": the loss of the mean of their probabilities by how likely each exit is: a sigmoid of its confidence
            over 0.8, at temperature 0.1, in place of the rule.
            "member": the loss of one member after the other.
            "force": confidence in a wrong class at the first exit, so that nothing else is asked.
            "delay": the entropy of all exits, so that every member is used; it raises the cost, and succeeds where the
            prediction falls too.
        norm, eps, num_steps, step_size: of each run of PGD, as in pgd.Config.
        early_stop, driver: as in pgd.Config.
    """

    mode: str = "average"
    norm: str = "linf"
    eps: str | float = "8/255"
    num_steps: int = 50
    step_size: str | float = "2.5 eps/steps"
    early_stop: bool = True
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "average-50"."""
    return f"{config.mode}-{config.num_steps}"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(outputs_fn, key, x, y) -> x_adv`.

    `outputs_fn` is `x -> (logits, aux)`, the logits by the ensemble's own rule and aux["member_logits"] (B, M, K).

    Raises:
        UserError: a setting is out of range.
    """
    one_of("mode of exits", config.mode, MODES)
    eps = settings.budget("exits", config, NORMS, num_steps=1)
    step_size = units.step_size(config.step_size, eps, config.num_steps, config.norm)
    program = pgd.Search(config.norm, "uniform", _OBJECTIVES[config.mode], True, config.early_stop)

    def attack(outputs_fn, key, x, y):
        outputs_fn = objectives.partial(outputs_fn, x)
        aux = jax.eval_shape(outputs_fn, x)[1]
        if "member_logits" not in aux:
            raise UserError("exits attacks the members of an ensemble: expected a model with member_logits")
        members = aux["member_logits"].shape[1] if config.mode == "member" else 1
        rows = dict(keys=rng.rowwise(key, x.shape[0]), x=x, y=y)
        inputs = driver.Inputs(outputs_fn, rows, dict(
            eps=jnp.asarray(eps, x.dtype), step_size=jnp.asarray(step_size, x.dtype)))

        def one(inputs, number):
            y = inputs.rows["y"], jnp.full(inputs.rows["x"].shape[0], number)
            inputs = inputs._replace(rows=inputs.rows | {"y": y}, scalars=inputs.scalars | {"restart": number})
            return driver.run(program, inputs, config.num_steps + 1, config.driver)

        return jax.lax.stop_gradient(driver.rounds(
            one, inputs, driver.none_yet(x), members, config.early_stop)["x"])

    return attack


# What is raised. y is (labels (B,), numbers of a member (B,)).


def _average(outputs, y):
    return losses.cross_entropy(jnp.mean(outputs[1]["member_logits"], 1), y[0])


def _probabilities(outputs, y):
    log_p = jax.nn.log_softmax(outputs[1]["member_logits"])
    return _surprise(jax.nn.logsumexp(log_p, 1) - jnp.log(log_p.shape[1]), y)


def _surprise(log_p, y):
    return -jnp.take_along_axis(log_p, y[0][:, None], -1)[:, 0]


def _losses(outputs, y):
    """(B, M)."""
    return jax.vmap(losses.cross_entropy, (1, None), 1)(outputs[1]["member_logits"], y[0])


def _each(outputs, y):
    return jnp.mean(_losses(outputs, y), -1)


def _best(outputs, y):
    return jnp.min(_losses(outputs, y), -1)


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


def _force(outputs, y):
    log_p = jax.nn.log_softmax(outputs[1]["member_logits"][:, 0])
    return losses.best_other(log_p, y[0])


def _delay(outputs, y):
    log_p = jax.nn.log_softmax(outputs[1]["member_logits"])
    return -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, -1), -1)


def _succeeds(outputs, y):
    return objectives.misclassified(outputs[0], y[0])


_OBJECTIVES = {name: Objective(loss, _succeeds) for name, loss in (
    ("average", _average), ("probabilities", _probabilities), ("each", _each), ("best", _best), ("soft", _soft),
    ("member", _member), ("force", _force), ("delay", _delay))}
MODES = tuple(_OBJECTIVES)
