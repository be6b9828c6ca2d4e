"""Carlini & Wagner's l2 attack: Adam on the distance and a hinge, in a space without box (IEEE S&P 2017, section VI).

x images (B, H, W, C) in [0, 1] are (tanh(w) + 1) / 2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from advmoe_jax.attacks import build, driver, minimal, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import losses

_INSIDE = 0.999999  # atanh is infinite on the border of the box
_PROGRESS = 0.9999  # a tenth of the steps must bring the loss below this share of it
_CHECKS = 10
_ADAM = optax.scale_by_adam()
ABOUT = About(("l2",))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of C&W; the defaults are the paper's.

    With c=1, num_steps=50 and binary_search_steps=1 it is the attack that papers run with torchattacks. `c` and
    `confidence` are in units of the logits: if those are s times as large, c / s and s confidence give the same images.
    """

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps("0.5")
    num_steps: int = settings.count(1000, "Adam steps for each c")
    binary_search_steps: int = settings.count(9, "values of c that are tried, each image having its own", most=100)
    c: float = setting(1e-3, "weight of the hinge in the first search step; times 10 until the attack succeeds, then "
                             "halfway between the largest that failed and the smallest that succeeded",
                       above=0, most=1e12)
    confidence: float = setting(0.0, "logit margin that an adversarial image must have", least=0, most=1e12)
    learning_rate: float = setting(0.01, "of Adam, in w", above=0, most=100)
    beyond: str = settings.beyond()
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "cw-l2-9x1000", "cw-l2-50"."""
    searched = f"{config.binary_search_steps}x" if config.binary_search_steps > 1 else ""
    return f"cw-l2-{searched}{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as minimal.attack_by does; it draws nothing."""
    config = settings.read("cw_l2", config)
    numbers = dict(eps=config.eps, c=config.c, confidence=config.confidence, learning_rate=config.learning_rate)
    program = _CW(config.num_steps, config.binary_search_steps, config.beyond, config.early_stop)
    looks = config.binary_search_steps * (config.num_steps + 1)
    return minimal.attack_by(lambda _: program, numbers, looks, config.driver)


@dataclasses.dataclass(frozen=True)
class _CW:
    """The attack as a `driver.Program`; a step looks at an iterate and moves it.

    Each image counts its own steps, and starts with its next c as soon as the last one has ended.
    """

    num_steps: int
    searches: int
    beyond: str
    early_stop: bool
    norm = "l2"
    stops = True
    cost = (1, 1)
    finish = minimal.finish

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x = inputs.rows["x"]
        zero, no = jnp.zeros(x.shape[0], x.dtype), jnp.zeros(x.shape[0], bool)
        return dict(**self._fresh(x), **minimal.none_yet(x), c=zero + inputs.scalars["c"], low=zero,
                    high=zero + jnp.inf, search=zero.astype(jnp.int32), through=no)

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        x, y, scalars = inputs.rows["x"], inputs.rows["y"], inputs.scalars

        def total(w):
            u = (jnp.tanh(w) + 1) / 2
            logits = inputs.logits_fn(u)
            hinge = jnp.maximum(scalars["confidence"] - losses.margin(logits, y), 0)
            loss = jnp.sum((u - x)**2, (1, 2, 3)) + carry["c"] * hinge
            favoured = logits + scalars["confidence"] * jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)
            return jnp.sum(loss), (loss, u, objectives.misclassified(favoured, y))

        grad, (loss, u, broken) = jax.grad(total, has_aux=True)(carry["w"])
        nearest = minimal.nearer(carry, inputs, u, broken, "l2")
        checked = carry["taken"] % math.ceil(self.num_steps / _CHECKS) == 0
        stuck = checked & ~(loss <= _PROGRESS * carry["checked_loss"])
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            updates, adam = jax.vmap(_ADAM.update)(jnp.nan_to_num(grad), carry["adam"])
        moved = {name: carry[name] for name in ("c", "low", "high", "search")} | dict(
            w=carry["w"] - scalars["learning_rate"] * updates, adam=adam, taken=carry["taken"] + 1,
            checked_loss=jnp.where(checked, loss, carry["checked_loss"]), succeeded=carry["succeeded"] | broken)
        search = driver.select(stuck | (carry["taken"] == self.num_steps), self._next_c(x, moved), moved)
        through = search["search"] == self.searches
        if self.early_stop:
            through |= nearest["within"]
        return dict(**search, **nearest, through=through)

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["through"]

    def _fresh(self, x):
        """What each search step starts from."""
        w = jnp.arctanh((2 * x - 1) * _INSIDE)
        return dict(w=w, adam=jax.vmap(_ADAM.init)(w), taken=jnp.zeros(x.shape[0], jnp.int32),
                    checked_loss=jnp.full(x.shape[0], jnp.inf, x.dtype), succeeded=jnp.zeros(x.shape[0], bool))

    def _next_c(self, x, last):
        low = jnp.where(last["succeeded"], last["low"], last["c"])
        high = jnp.where(last["succeeded"], last["c"], last["high"])
        c = jnp.where(jnp.isinf(high), 10 * last["c"], (low + high) / 2)
        return dict(**self._fresh(x), c=c, low=low, high=high, search=last["search"] + 1)
