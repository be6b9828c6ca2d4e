"""DDN: decoupled direction and norm in l2 (Rony et al., CVPR 2019, algorithm 1).

x images (B, H, W, C) in [0, 1].
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, minimal, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls

_LAST_STEP_SIZE = 0.01
ABOUT = About(("l2",))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of DDN; the defaults are the authors', but for `levels`.

    Attributes:
        num_steps: gradient steps; the norm, before the box, stays above start_eps (1 - gamma)^num_steps.
        start_eps: norm of the first perturbation, more than 0.
        gamma: share by which the norm shrinks on a misclassified iterate and grows on another, 0 to 1.
        levels: grey levels that the images are rounded to, 256 as the authors do; 0 for no rounding.
        norm ("l2"), eps, beyond, early_stop, driver: see attacks.settings.
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


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as minimal.attack_by does."""
    numbers = settings.read("ddn", config, ABOUT, num_steps=1, levels=0, start_eps="more than 0",
                            gamma="more than 0 and less than 1")
    if config.levels == 1:
        raise UserError("ddn has levels=1: expected 0 for no rounding, or 2 or more")
    program = _DDN(config.levels, config.beyond, config.early_stop)
    numbers["num_steps"] = config.num_steps
    return minimal.attack_by(lambda _: program, numbers, config.num_steps + 1, config.driver)


def step_size(i: jax.Array, num_steps: jax.Array) -> jax.Array:
    """From 1 to 0.01 along half a cosine."""
    return _LAST_STEP_SIZE + (1 - _LAST_STEP_SIZE) * (1 + jnp.cos(jnp.pi * i / num_steps)) / 2


@dataclasses.dataclass(frozen=True)
class _DDN:
    """The attack as a `driver.Program`; step i looks at iterate i and then moves it; the last move is not used."""

    levels: int
    beyond: str
    stops: bool
    norm = "l2"
    cost = (1, 1)
    finish = minimal.finish

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x = inputs.rows["x"]
        return dict(x=x, radius=jnp.broadcast_to(inputs.scalars["start_eps"], x.shape[:1]), **minimal.none_yet(x))

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        x, u, scalars = inputs.rows["x"], carry["x"], inputs.scalars
        _, grad, broken = objectives.gradient(objectives.NAMED["ce"], inputs.logits_fn, u, inputs.rows["y"])
        nearest = minimal.nearer(carry, inputs, u, broken, "l2")
        direction = balls.steepest(jnp.nan_to_num(grad), u, "l2", rng.fold_in(inputs.rows["keys"], i))
        delta = u - x + step_size(i, scalars["num_steps"]) * direction
        radius = carry["radius"] * jnp.where(broken, 1 - scalars["gamma"], 1 + scalars["gamma"])
        radius = jnp.minimum(radius, balls.norm(jnp.maximum(x, 1 - x), "l2"))
        u = jnp.clip(x + radius[:, None, None, None] * balls.normalized(delta), 0, 1)
        if self.levels:
            u = jnp.round(u * (self.levels - 1)) / (self.levels - 1)
        return dict(x=u, radius=radius, **nearest)

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["within"]
