"""What attacks that draw at random share: the worst of some draws, and the weakest noise that changes the class.

x images (B, H, W, C) in [0, 1]. Noise is a function `noise(key, x, strength) -> x_adv` of one image (H, W, C) that
moves no pixel back as the strength grows.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng, units
from advmoe_jax.ops import balls, losses

_MOST = 1  # strength: a standard deviation, or a share
_HALVINGS = 30
_PRECISION = 0.01  # of the strength at which a draw breaks the image, relative; halving ends there


def look(inputs: driver.Inputs, x: jax.Array) -> dict[str, jax.Array]:
    """A driver's candidate of images, by one forward pass; its loss is the cross-entropy."""
    logits, y = inputs.logits_fn(x), inputs.rows["y"]
    return dict(x=x, loss=losses.cross_entropy(logits, y), broken=objectives.misclassified(logits, y))


def label(name: str, strength: str | float, draws: int) -> str:
    """As tables name it: "noise", or of a fixed strength "noise-0.1", "noise-0.1-worst-of-10"."""
    if not units.number(strength):
        return name
    return f"{name}-{units.number(strength):g}" + (f"-worst-of-{draws}" if draws > 1 else "")


def attack_by(noise: Callable, about: About, config: Any, name: str) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does, of noise.

    Args:
        noise: a function of a module, so that compiled programs are shared.
        about: of the attack.
        config: with norm, eps, draws, num_steps, early_stop, driver and `about.fixed_by`, the fixed strength.
        name: of the attack.
    Raises:
        UserError: a setting is out of range.
    """
    config = settings.read(name, config)
    strength = getattr(config, about.fixed_by)
    if strength and config.draws == 1:  # nothing to choose from: no pass through the model
        return build.of_images(lambda keys, x: _draw_jitted(
            noise, dict(keys=keys, x=x), jnp.asarray(strength, x.dtype)))
    if strength:
        program, num_steps = Tries(_drawn, noise, config.early_stop), config.draws
    else:
        program = _Search(noise, config.norm, config.num_steps, config.early_stop)
        num_steps = 1 + config.draws * program.steps_per_draw
    return build.one_run(program, num_steps, config.driver, eps=config.eps, strength=strength)


def _draw(noise, rows, strength, number=0):
    keys = rng.fold_in(rows["keys"], number)
    return jax.vmap(noise, (0, 0, None if strength.ndim == 0 else 0))(keys, rows["x"], strength)


_draw_jitted = jax.jit(_draw, static_argnames="noise")


def _drawn(noise, inputs, i):
    return _draw(noise, inputs.rows, inputs.scalars["strength"], i)


@dataclasses.dataclass(frozen=True)
class Tries:
    """The worst of some images as a `driver.Program`; step i looks at try_fn(settings, inputs, i).

    `try_fn` is a function of a module, and `settings` are hashable, so that compiled programs are shared.
    """

    try_fn: Callable[[Any, driver.Inputs, jax.Array], jax.Array]
    settings: Any
    stops: bool
    cost = (1, 0)

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        return driver.none_yet(inputs.rows["x"])

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        return driver.worse(carry, look(inputs, self.try_fn(self.settings, inputs, i)))

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["broken"]

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return carry


@dataclasses.dataclass(frozen=True)
class _Search:
    """The smallest noise as a `driver.Program`: step 0 looks at the clean images, then each draw has its steps.

    A draw grows in `num_steps` equal steps up to the budget. The first step that breaks the image is then halved again
    and again. The loss of a broken candidate is its negative distance.
    """

    noise: Callable
    norm: str
    num_steps: int
    early_stop: bool
    stops = True
    cost = (1, 0)

    @property
    def steps_per_draw(self):
        return self.num_steps + max(math.ceil(-math.log2(_PRECISION * self.num_steps)), 0)

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x = inputs.rows["x"]
        zero = jnp.zeros(x.shape[0], x.dtype)
        return dict(worst=driver.none_yet(x), reach=zero, low=zero, high=zero, hit=jnp.zeros(x.shape[0], bool))

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        rows, worst, i = inputs.rows, carry["worst"], jnp.asarray(i)
        number, n = jnp.divmod(jnp.maximum(i - 1, 0), self.steps_per_draw)
        is_first = (n == 0) & (i > 0)
        reach = jax.lax.cond(is_first, lambda: self._reach(inputs, number), lambda: carry["reach"])
        low, high = jnp.where(is_first, 0, carry["low"]), jnp.where(is_first, reach, carry["high"])
        hit = carry["hit"] & ~is_first

        halved = jnp.where(high - low > _PRECISION * high, (low + high) / 2, high)
        strength = jnp.where(hit, halved, jnp.minimum(low + reach / self.num_steps, reach))
        drawn = look(inputs, _draw(self.noise, rows, strength, number))
        broken = drawn["broken"]
        drawn["loss"] = jnp.where(broken, -balls.norm(drawn["x"] - rows["x"], self.norm), drawn["loss"])
        return dict(worst=driver.worse(worst, drawn), reach=reach, low=jnp.where(broken, low, strength),
                    high=jnp.where(broken, strength, high), hit=hit | broken)

    def done(self, carry: driver.Carry) -> jax.Array:
        worst = carry["worst"]
        return worst["broken"] & (self.early_stop | (worst["loss"] >= 0))

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return carry["worst"]

    def _reach(self, inputs, number):
        """The largest strength (B,) of a draw that stays within eps."""
        rows = inputs.rows

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            moved = _draw(self.noise, rows, middle, number) - rows["x"]
            within = balls.norm(moved, self.norm) <= inputs.scalars["eps"]
            return jnp.where(within, middle, low), jnp.where(within, high, middle)

        low = jnp.zeros(rows["x"].shape[0], rows["x"].dtype)
        return jax.lax.fori_loop(0, _HALVINGS, halve, (low, low + _MOST))[0]
