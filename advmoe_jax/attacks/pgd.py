"""Projected gradient descent in linf, l2 and l1 (Madry et al., ICLR 2018; l1 by SLIDE, Tramer & Boneh 2019).

x images (B, H, W, C) in [0, 1]; eps and step sizes in the same units.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, objectives
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.ops import balls

STARTS = ("uniform", "gaussian", "none")
_TRADES_NOISE = 0.001


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
    driver: str = "auto"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`.

    `logits_fn` is best a `jax.tree_util.Partial(apply, variables)`: a closure works, but its weights become
    constants and each new closure compiles again. `key` is one key or one per example. `y` is (B,) labels, or
    what the objective takes in their place.

    Raises:
        UserError: a setting is out of range.
    """
    one_of("norm", config.norm, balls.NORMS)
    one_of("start", config.start, STARTS)
    one_of("keep", config.keep, ("best", "last"))
    one_of("driver", config.driver, driver.DRIVERS)
    for name in ("num_steps", "restarts"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"pgd has {name}={value!r}: expected a whole number, 1 or more")
    eps = units.eps(config.eps, config.norm)
    step_size = units.step_size(config.step_size, eps, config.num_steps, config.norm)
    program = _PGD(config.norm, config.start, objectives.get(config.loss), config.keep == "best")

    def attack(logits_fn, key, x, y):
        keys = rng.per_example(key, jnp.arange(x.shape[0])) if key.ndim == 0 else key
        if not isinstance(logits_fn, jax.tree_util.Partial):
            logits_fn = jax.tree_util.Partial(logits_fn)
        args = dict(logits_fn=logits_fn, x=x, y=y, eps=jnp.asarray(eps, x.dtype),
                    step_size=jnp.asarray(step_size, x.dtype))
        worst = None
        for restart in range(config.restarts):
            restart_keys = rng.fold_in(keys, restart)
            found = driver.run(program, {**args, "keys": restart_keys}, config.num_steps, config.driver)
            worst = found if worst is None else _worse(worst, found)
        return jax.lax.stop_gradient(worst["x"])

    return attack


def _worse(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Per example the broken one of two candidates, or the one of higher loss; `a` on a tie or a NaN."""
    take = (b["broken"] & ~a["broken"]) | ((b["broken"] == a["broken"]) & (b["loss"] > a["loss"]))
    return jax.tree.map(lambda u, v: jnp.where(take.reshape(-1, *[1] * (u.ndim - 1)), v, u), a, b)


@dataclasses.dataclass(frozen=True)
class _PGD:
    """One restart as a `driver.Program`. A candidate is {x, loss, broken}."""

    norm: str
    start_name: str
    objective: objectives.Objective
    keep_best: bool

    def start(self, args: Any) -> Any:
        x, eps = args["x"], args["eps"]
        if self.start_name == "uniform":
            x_adv = balls.random_start(args["keys"], x, eps, self.norm)
        elif self.start_name == "gaussian":
            noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(args["keys"])
            x_adv = balls.project(x + _TRADES_NOISE * noise, x, eps, self.norm)
        else:
            x_adv = x
        worst = dict(x=x, loss=jnp.full(x.shape[0], -jnp.inf, x.dtype), broken=jnp.zeros(x.shape[0], bool))
        # The carry is donated: it must own its buffers.
        return jnp.array(x_adv), jax.tree.map(jnp.array, worst)

    def step(self, args: Any, carry: Any, i: jax.Array) -> Any:
        x_adv, worst = carry

        def total(u):
            outputs = args["logits_fn"](u)
            loss = self.objective.loss(outputs, args["y"])
            return jnp.sum(loss), (loss, self.objective.success(outputs, args["y"]))

        grad, (loss, broken) = jax.grad(total, has_aux=True)(x_adv)
        if self.keep_best:
            worst = _worse(worst, dict(x=x_adv, loss=loss, broken=broken))
        keys = rng.fold_in(args["keys"], i)
        direction = balls.steepest(jnp.nan_to_num(grad), x_adv, self.norm, keys)
        return balls.project(x_adv + args["step_size"] * direction, args["x"], args["eps"], self.norm), worst

    def finish(self, args: Any, carry: Any) -> Any:
        x_adv, worst = carry
        outputs = args["logits_fn"](x_adv)
        last = dict(x=x_adv, loss=self.objective.loss(outputs, args["y"]),
                    broken=self.objective.success(outputs, args["y"]))
        return _worse(worst, last) if self.keep_best else last
