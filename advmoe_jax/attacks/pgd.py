"""Projected gradient descent in linf, l2 and l1 (Madry et al., ICLR 2018; l1 by SLIDE, Tramer & Boneh 2019).

x images (B, H, W, C) in [0, 1]; eps and step sizes in the same units.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls

STARTS = ("uniform", "gaussian", "none")
_TRADES_NOISE = 0.001
ABOUT = About(balls.NORMS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of PGD."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps()
    num_steps: int = settings.count(50, "gradient steps in each restart")
    step_size: str | float = settings.step_size()
    restarts: int = settings.count(1, "starts, of which each example keeps the worst")
    start: str = setting("uniform", "uniform in the ball, gaussian (standard deviation 0.001, as TRADES) or none",
                         choices=STARTS)
    l1_share: float = setting(balls.SHARE, "of the coordinates, that an l1 step moves", above=0, most=1)
    loss: str | objectives.Objective = settings.loss()
    keep: str = setting("best", "the best iterate by (broken, loss), or the last one as papers do, which is weaker",
                        choices=("best", "last"))
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "pgd-50"."""
    return f"pgd-{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`.

    `logits_fn` is best a `jax.tree_util.Partial(apply, variables)`. A closure works too, but its weights become
    constants, and other weights compile again. `key` is one key or one per example. `y` is (B,) labels, or what the
    objective takes in their place. A `route`, an array with leading B, is what the model takes beside the images. x_adv
    and all computations beside the model are in float32, or float64 as `x` is, whatever float type the logits have.
    Like `make` of every attack, this one checks its settings.

    Raises:
        UserError: a setting is out of range. From the attack: images, labels, keys or model cannot be, see
            attacks.checks.
    """
    config = settings.read("pgd", config)
    if config.early_stop and config.keep == "last":
        raise UserError("pgd has early_stop=True and keep='last': expected keep='best', which it may stop at")
    step_size = units.step_size(config.step_size, config.eps, config.num_steps, config.norm, "step_size of pgd")
    looks_at_last = config.keep == "best" or config.restarts > 1
    program = Search(config.norm, config.start, objectives.get(config.loss), config.keep == "best", config.early_stop,
                     looks_at_last=looks_at_last, share=config.l1_share)

    def attack(logits_fn, key, x, y, route=None):
        inputs = build.inputs_of(logits_fn, key, x, y, takes=objectives.takes(config.loss), eps=config.eps,
                                 step_size=step_size)
        if route is not None:
            inputs.rows["route"] = route

        def one(inputs, restart):
            started = inputs._replace(scalars=inputs.scalars | {"restart": restart})
            return driver.run(program, started, config.num_steps + looks_at_last, config.driver)

        worst = driver.none_yet(inputs.rows["x"])
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
    share: float = balls.SHARE

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
        keys = rng.fold_in(self._keys(inputs), i)
        direction = balls.steepest(jnp.nan_to_num(grad), x_adv, self.norm, keys, self.share)
        moved = x_adv + inputs.scalars["step_size"] * direction
        return balls.project(moved, inputs.rows["x"], inputs.scalars["eps"], self.norm), kept

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry[1]["broken"]

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return carry[1] if self.looks_at_last else carry[1] | {"x": carry[0]}

    def _keys(self, inputs):
        return rng.fold_in(inputs.rows["keys"], inputs.scalars.get("restart", 0))
