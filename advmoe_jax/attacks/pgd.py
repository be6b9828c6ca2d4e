"""Projected gradient descent in linf, l2 and l1 (Madry et al., ICLR 2018; l1 by SLIDE, Tramer & Boneh 2019).

x images (B, H, W, C) in [0, 1]; eps and step sizes in the same units.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.ops import balls

STARTS = ("uniform", "gaussian", "none")
_TRADES_NOISE = 0.001
ABOUT = About(balls.NORMS)


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
        early_stop, driver: see attacks.settings.
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


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`.

    `logits_fn` is best a `jax.tree_util.Partial(apply, variables)`. A closure works too, but its weights become
    constants, and other weights compile again. `key` is one key or one per example. `y` is (B,) labels, or what the
    objective takes in their place. Like `make` of every attack, this one checks its settings.

    Raises:
        UserError: a setting is out of range.
    """
    one_of("start", config.start, STARTS)
    one_of("keep", config.keep, ("best", "last"))
    if config.early_stop and config.keep == "last":
        raise UserError("pgd has early_stop=True and keep='last': expected keep='best', which it may stop at")
    eps = settings.read("pgd", config, ABOUT, num_steps=1, restarts=1)["eps"]
    step_size = units.step_size(config.step_size, eps, config.num_steps, config.norm)
    looks_at_last = config.keep == "best" or config.restarts > 1
    program = Search(config.norm, config.start, objectives.get(config.loss), config.keep == "best", config.early_stop,
                     looks_at_last=looks_at_last)

    def attack(logits_fn, key, x, y):
        inputs = build.inputs_of(logits_fn, key, x, y, eps=eps, step_size=step_size)

        def one(inputs, restart):
            started = inputs._replace(scalars=inputs.scalars | {"restart": restart})
            return driver.run(program, started, config.num_steps + looks_at_last, config.driver)

        worst = driver.none_yet(x)
        return jax.lax.stop_gradient(driver.rounds(one, inputs, worst, config.restarts, config.early_stop)["x"])

    return attack


@dataclasses.dataclass(frozen=True)
class Search:
    """One restart as a `driver.Program`. Step i looks at iterate i, then moves it.

    The result is an iterate that was looked at; without `looks_at_last` it is where the last step moved to.
    Rows are "keys", "x", "y"; optional are "init", images to start from, and "route", what the model takes beside the
    image. Scalars are "eps", "step_size" and, unless it is 0, "restart".
    """

    norm: str
    start_name: str
    objective: objectives.Objective
    keep_best: bool
    stops: bool
    cost: tuple[int, int] = (1, 1)
    looks_at_last: bool = True

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x, eps, keys = inputs.rows["x"], inputs.scalars["eps"], self._keys(inputs)
        if "init" in inputs.rows:
            x_adv = balls.project(inputs.rows["init"], x, eps, self.norm)
        elif self.start_name == "uniform":
            x_adv = balls.random_start(keys, x, eps, self.norm)
        elif self.start_name == "gaussian":
            x_adv = balls.project(x + _TRADES_NOISE * build.noise(keys, x, "l2"), x, eps, self.norm)
        else:
            x_adv = x
        return x_adv, driver.none_yet(x)

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        x_adv, kept = carry
        route = (inputs.rows["route"],) if "route" in inputs.rows else ()
        loss, grad, broken = objectives.gradient(self.objective, inputs.logits_fn, x_adv, inputs.rows["y"], *route)
        candidate = dict(x=x_adv, loss=loss, broken=broken)
        kept = driver.worse(kept, candidate) if self.keep_best else candidate
        direction = balls.steepest(jnp.nan_to_num(grad), x_adv, self.norm, rng.fold_in(self._keys(inputs), i))
        moved = x_adv + inputs.scalars["step_size"] * direction
        return balls.project(moved, inputs.rows["x"], inputs.scalars["eps"], self.norm), kept

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry[1]["broken"]

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return carry[1] if self.looks_at_last else carry[1] | {"x": carry[0]}

    def _keys(self, inputs):
        return rng.fold_in(inputs.rows["keys"], inputs.scalars.get("restart", 0))
