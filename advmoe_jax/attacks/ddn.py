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
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls, losses

_LAST_STEP_SIZE = 0.01
ABOUT = About(("l2",))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of DDN; the defaults are the authors', but for `levels`."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps("0.5")
    num_steps: int = settings.count(100, "gradient steps; the norm, before the box, stays above "
                                         "start_eps (1 - gamma)^num_steps")
    start_eps: str | float = setting(1.0, "norm of the first perturbation", above=0, most=1e6)
    gamma: float = setting(0.05, "share by which the norm shrinks on a misclassified iterate and grows on another",
                           above=0, most=0.999)
    levels: int = settings.count(0, "grey levels that the images are rounded to, 256 as the authors do; 0 for no "
                                    "rounding", least=0, most=2**16)
    beyond: str = settings.beyond()
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "ddn-100"."""
    return f"ddn-{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as minimal.attack_by does."""
    config = settings.read("ddn", config)
    if config.levels == 1:
        raise UserError("ddn has levels=1: expected 0 for no rounding, or 2 or more")
    program = _DDN(config.levels, config.beyond, config.early_stop)
    numbers = dict(eps=config.eps, start_eps=config.start_eps, gamma=config.gamma, num_steps=config.num_steps)
    return minimal.attack_by(lambda _: program, numbers, config.num_steps + 1, config.driver)


def step_size(i: jax.Array, num_steps: jax.Array) -> jax.Array:
    """From 1 to 0.01 along half a cosine."""
    return _LAST_STEP_SIZE + (1 - _LAST_STEP_SIZE) * (1 + jnp.cos(jnp.pi * i / num_steps)) / 2


def _odds(logits, y):
    """log((1 - p_y) / p_y), which rises in the direction of the cross-entropy and is never saturated."""
    return jax.nn.logsumexp(losses.others(logits, y), -1) - jnp.take_along_axis(logits, y[:, None], -1)[:, 0]


_ODDS = objectives.Objective(_odds, objectives.misclassified)


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
        _, grad, broken = objectives.gradient(_ODDS, inputs.logits_fn, u, inputs.rows["y"])
        nearest = minimal.nearer(carry, inputs, u, broken, "l2")
        direction = balls.steepest(jnp.nan_to_num(grad), u, "l2", rng.fold_in(inputs.rows["keys"], i))
        delta = u - x + step_size(jnp.asarray(i, x.dtype), scalars["num_steps"]) * direction
        radius = carry["radius"] * jnp.where(broken, 1 - scalars["gamma"], 1 + scalars["gamma"])
        radius = jnp.minimum(radius, balls.norm(jnp.maximum(x, 1 - x), "l2"))
        u = jnp.clip(x + radius[:, None, None, None] * balls.normalized(delta), 0, 1)
        if self.levels:
            u = jnp.round(u * (self.levels - 1)) / (self.levels - 1)
        return dict(x=u, radius=radius, **nearest)

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["within"]
