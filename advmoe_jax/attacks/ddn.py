"""DDN: decoupled direction and norm in l2 (Rony et al., CVPR 2019, algorithm 1).

x images (B, H, W, C) in [0, 1].
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, minimal, objectives, settings
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls, losses

_LAST_STEP_SIZE = 0.01
NORMS = ("l2",)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of DDN; the defaults are the authors', but for `levels`.

    Attributes:
        norm: "l2".
        eps: budget, a number or a fraction.
        num_steps: gradient steps; the norm, before the box, stays above start_eps (1 - gamma)^num_steps.
        start_eps: norm of the first perturbation, more than 0.
        gamma: share by which the norm shrinks on a misclassified iterate and grows on another, 0 to 1.
        levels: grey levels that the images are rounded to, 256 as the authors do; 0 for no rounding.
        beyond: see attacks.settings.
        early_stop: as in fab.Config.
        driver: see attacks.driver.
    """

    norm: str = "l2"
    eps: str | float = 0.5
    num_steps: int = 100
    start_eps: str | float = 1.0
    gamma: float = 0.05
    levels: int = 0
    beyond: str = "clean"
    early_stop: bool = False
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "ddn-100"."""
    return f"ddn-{config.num_steps}"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    Images that are misclassified when clean come back as they are.

    Raises:
        UserError: a setting is out of range.
    """
    eps = settings.budget("ddn", config, NORMS, num_steps=1, levels=0)
    if config.levels == 1:
        raise UserError("ddn has levels=1: expected 0 for no rounding, or 2 or more")
    numbers = dict(eps=eps, num_steps=config.num_steps,
                   start_eps=units.number(config.start_eps, "ddn's start_eps"),
                   gamma=units.number(config.gamma, "ddn's gamma"))
    if numbers["start_eps"] <= 0:
        raise UserError(f"ddn has start_eps={config.start_eps}: expected more than 0")
    if not 0 < numbers["gamma"] < 1:
        raise UserError(f"ddn has gamma={config.gamma}: expected more than 0 and less than 1")
    program = _DDN(config.levels, config.beyond, config.early_stop)
    return minimal.attack_by(lambda _: program, numbers, config.num_steps + 1, config.driver)


def step_size(i: jax.Array, num_steps: jax.Array) -> jax.Array:
    """From 1 to 0.01 along half a cosine."""
    return _LAST_STEP_SIZE + (1 - _LAST_STEP_SIZE) * (1 + jnp.cos(jnp.pi * i / num_steps)) / 2


@dataclasses.dataclass(frozen=True)
class _DDN:
    """The attack as a `driver.Program`; step i looks at iterate i and then moves, in vain after the last look."""

    levels: int
    beyond: str
    stops: bool
    cost = (1, 1)

    def start(self, inputs: driver.Inputs) -> Any:
        x = inputs.rows["x"]
        return dict(x=x, radius=jnp.broadcast_to(inputs.scalars["start_eps"], x.shape[:1]), **minimal.none_yet(x),
                    within=jnp.zeros(x.shape[0], bool))

    def step(self, inputs: driver.Inputs, carry: Any, i: jax.Array) -> Any:
        x, y, u = inputs.rows["x"], inputs.rows["y"], carry["x"]
        scalars = inputs.scalars

        def total(v):
            logits = inputs.logits_fn(v)
            return jnp.sum(losses.cross_entropy(logits, y)), objectives.misclassified(logits, y)

        grad, broken = jax.grad(total, has_aux=True)(u)
        found = minimal.nearer(carry, x, u, broken, "l2")
        direction = balls.steepest(jnp.nan_to_num(grad), u, "l2", rng.fold_in(inputs.rows["keys"], i))
        delta = u - x + step_size(i, scalars["num_steps"]) * direction
        radius = carry["radius"] * jnp.where(broken, 1 - scalars["gamma"], 1 + scalars["gamma"])
        radius = jnp.minimum(radius, balls.norm(jnp.maximum(x, 1 - x), "l2"))
        u = jnp.clip(x + radius[:, None, None, None] * balls.normalized(delta), 0, 1)
        if self.levels:
            u = jnp.round(u * (self.levels - 1)) / (self.levels - 1)
        return dict(x=u, radius=radius, **found, within=found["distance"] <= scalars["eps"])

    def done(self, carry: Any) -> jax.Array:
        return carry["within"]

    def finish(self, inputs: driver.Inputs, carry: Any) -> Any:
        return minimal.candidate(carry, inputs.rows["x"], inputs.scalars["eps"], "l2", self.beyond)
