"""Projected gradient descent in linf, l2 and l1 (Madry et al., ICLR 2018; l1 by SLIDE, Tramer & Boneh 2019).

x images (B, H, W, C) in [0, 1]; eps and step sizes in the same units.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, objectives, settings
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.ops import balls

STARTS = ("uniform", "gaussian", "none")
_TRADES_NOISE = 0.001
NORMS = balls.NORMS


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of PGD.

    Attributes:
        norm: "linf" | "l2" | "l1".
        eps: budget, a number or a fraction such as "8/255".
        num_steps: gradient steps in each restart.
        step_size: a number, a fraction, "0.625 eps" or "2.5 eps/steps".
        restarts: starts, of which each example keeps the worst.
        start: "uniform" in the ball, "gaussian" (standard deviation 0.001, as TRADES) or "none".
        loss: "ce" | "margin" | "kl", or an Objective.
        keep: "best" iterate by (broken, loss), or the "last" one as papers do, which is weaker.
        early_stop: whether an image is left alone once it is broken. Outside a traced program that saves its share
            of the work; the verdicts are the same.
        driver: see attacks.driver.
    """

    norm: str = "linf"
    eps: str | float = "8/255"
    num_steps: int = 50
    step_size: str | float = "2.5 eps/steps"
    restarts: int = 1
    start: str = "uniform"
    loss: str | objectives.Objective = "ce"
    keep: str = "best"
    early_stop: bool = False
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "pgd-50"."""
    return f"pgd-{config.num_steps}"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`.

    `logits_fn` is best a `jax.tree_util.Partial(apply, variables)`: a closure works, but its weights become
    constants, and with others it is compiled again. `key` is one key or one per example. `y` is (B,) labels, or
    what the objective takes in their place.

    Raises:
        UserError: a setting is out of range.
    """
    one_of("start", config.start, STARTS)
    one_of("keep", config.keep, ("best", "last"))
    if config.early_stop and config.keep == "last":
        raise UserError("pgd has early_stop=True and keep='last': expected keep='best', which it may stop at")
    eps = settings.budget("pgd", config, NORMS, num_steps=1, restarts=1)
    step_size = units.step_size(config.step_size, eps, config.num_steps, config.norm)
    looks_at_last = config.keep == "best" or config.restarts > 1
    program = Search(config.norm, config.start, objectives.get(config.loss), config.keep == "best", config.early_stop,
                     looks_at_last=looks_at_last)

    def attack(logits_fn, key, x, y):
        rows = dict(keys=rng.rowwise(key, x.shape[0]), x=x, y=y)
        scalars = dict(eps=jnp.asarray(eps, x.dtype), step_size=jnp.asarray(step_size, x.dtype))
        inputs = driver.Inputs(objectives.partial(logits_fn, x), rows, scalars)

        def one(inputs, restart):
            started = inputs._replace(scalars=inputs.scalars | {"restart": restart})
            return driver.run(program, started, config.num_steps + looks_at_last, config.driver)

        worst = driver.none_yet(x)
        return jax.lax.stop_gradient(driver.rounds(one, inputs, worst, config.restarts, config.early_stop)["x"])

    return attack


@dataclasses.dataclass(frozen=True)
class Search:
    """One restart as a `driver.Program`; step i looks at iterate i and then moves, in vain after the last look.

    Without `looks_at_last` the result is where the last step moved to, of which nothing is known.
    Rows are "keys", "x", "y"; "init", images to start from, if there are any; and "route", what the model takes beside
    the image, if it takes anything. Scalars are "eps", "step_size", "restart".
    """

    norm: str
    start_name: str
    objective: objectives.Objective
    keep_best: bool
    stops: bool
    cost: tuple[int, int] = (1, 1)
    looks_at_last: bool = True

    def start(self, inputs: driver.Inputs) -> Any:
        x, eps = inputs.rows["x"], inputs.scalars["eps"]
        keys = self._keys(inputs)
        if "init" in inputs.rows:
            x_adv = balls.project(inputs.rows["init"], x, eps, self.norm)
        elif self.start_name == "uniform":
            x_adv = balls.random_start(keys, x, eps, self.norm)
        elif self.start_name == "gaussian":
            noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)
            x_adv = balls.project(x + _TRADES_NOISE * noise, x, eps, self.norm)
        else:
            x_adv = x
        return x_adv, driver.none_yet(x)

    def step(self, inputs: driver.Inputs, carry: Any, i: jax.Array) -> Any:
        x_adv, found = carry
        y = inputs.rows["y"]
        route = (inputs.rows["route"],) if "route" in inputs.rows else ()

        def total(u):
            outputs = inputs.logits_fn(u, *route)
            loss = self.objective.loss(outputs, y)
            return jnp.sum(loss), (loss, self.objective.success(outputs, y))

        grad, (loss, broken) = jax.grad(total, has_aux=True)(x_adv)
        now = dict(x=x_adv, loss=loss, broken=broken)
        found = driver.worse(found, now) if self.keep_best else now
        direction = balls.steepest(jnp.nan_to_num(grad), x_adv, self.norm, rng.fold_in(self._keys(inputs), i))
        moved = x_adv + inputs.scalars["step_size"] * direction
        return balls.project(moved, inputs.rows["x"], inputs.scalars["eps"], self.norm), found

    def done(self, carry: Any) -> jax.Array:
        return carry[1]["broken"]

    def finish(self, inputs: driver.Inputs, carry: Any) -> Any:
        return carry[1] if self.looks_at_last else carry[1] | {"x": carry[0]}

    def _keys(self, inputs):
        return rng.fold_in(inputs.rows["keys"], inputs.scalars["restart"])
