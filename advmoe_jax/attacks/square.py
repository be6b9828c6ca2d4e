"""The Square attack: random search in square windows, without gradients (Andriushchenko et al., ECCV 2020).

x images (B, H, W, C) in [0, 1]. Every image has its own windows, colours and directions; the reference code draws them
once a batch and never uses the last row and column of positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, driver, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls, losses

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the share of the image is halved
ABOUT = About(balls.NORMS, takes="values")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of Square; the defaults are AutoAttack's."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps()
    num_queries: int = settings.count(5000, "forward passes after the first one")
    share: float = setting(0.8, "of the image that the first windows cover; it is halved after 10, 50, 200, 500, 1000, "
                                "... queries", above=0, most=1)
    early_stop: bool = settings.early_stop(True)
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "square"."""
    return "square" if config.num_queries == 5000 else f"square-{config.num_queries}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.
    """
    config = settings.read("square", config)

    def attack(logits_fn, key, x, y):
        inputs = build.inputs_of(logits_fn, key, x, y, eps=config.eps)
        program = _Square(config.norm, sides(config, *inputs.rows["x"].shape[1:3]), config.early_stop)
        return jax.lax.stop_gradient(driver.run(program, inputs, config.num_queries + 1, config.driver)["x"])

    return attack


def sides(config: Config, height: int, width: int) -> tuple[tuple[int, int], ...]:
    """(first query, side of the windows in pixels), in order, for as long as there are queries."""
    stages = []
    for halvings, first in enumerate((0, *(after + 1 for after in _HALVINGS))):
        side = max(round((config.share / 2**halvings * height * width) ** 0.5), 1 if config.norm == "linf" else 3)
        if config.norm != "linf" and side % 2 == 0:
            side += 1
        if first < config.num_queries:
            stages.append((first, min(side, height, width)))
    return tuple(stages)


@functools.cache
def bump(norm: str, side: int) -> np.ndarray:
    """The direction that l2 and l1 windows get, (side, side), of norm 1: a positive half above a negative one, both
    of nested rectangles that weigh less the wider they are."""
    power = 2 if norm == "l2" else 4

    def rectangles(height, width):
        values = np.zeros((height, width))
        if not height:
            return values
        top, left = height // 2, width // 2
        for n in range(max(height, width) // 2 + 1):
            values[max(top - n, 0):max(top + n + 1, 0), max(left - n, 0):max(left + n + 1, 0)] += 1 / (n + 1) ** power
        return values / size(values)

    def size(values):
        return np.sqrt((values**2).sum()) if norm == "l2" else np.abs(values).sum()

    values = np.concatenate([rectangles(side // 2, side), -rectangles(side - side // 2, side)])
    return (values / size(values)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Square:
    """The attack as a `driver.Program`; step 0 tries the first perturbation, step i a window of query i - 1."""

    norm: str
    sides: tuple[tuple[int, int], ...]
    stops: bool
    cost = (1, 0)

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        return driver.none_yet(inputs.rows["x"])

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        rows, eps = inputs.rows, inputs.scalars["eps"]
        keys = rng.fold_in(rows["keys"], i)
        first = functools.partial(self._first, eps=eps)
        window = functools.partial(self._window, eps=eps, stage=self._stage(i - 1))
        x_new = jax.lax.cond(i == 0, jax.vmap(first), jax.vmap(window), keys, rows["x"], carry["x"])
        logits = inputs.logits_fn(x_new)
        margin, broken = losses.margin(logits, rows["y"]), objectives.misclassified(logits, rows["y"])
        better = ~carry["broken"] & (broken | (margin > carry["loss"]))
        return driver.select(better, dict(x=x_new, loss=margin, broken=broken), carry)

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["broken"]

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return carry

    def _stage(self, i):
        return jnp.sum(i >= jnp.asarray([first for first, _ in self.sides], jnp.int32)) - 1

    def _bumps(self, height, width):
        """(stages, 2, H, W): bumps in the upper left corner, as they are and turned."""
        bumps = np.zeros((len(self.sides), 2, height, width), np.float32)
        for stage, (_, side) in enumerate(self.sides):
            values = bump(self.norm, side)
            bumps[stage, 0, :side, :side], bumps[stage, 1, :side, :side] = values, values.T
        return bumps

    # One image (H, W, C) each from here on.

    def _first(self, key, x, _, *, eps):
        """linf: columns of +-eps. l2 and l1: tiles of bumps, a fifth of the image wide."""
        height, width, channels = x.shape
        if self.norm == "linf":
            return jnp.clip(x + eps * _signs(key, (1, width, channels), x.dtype), 0, 1)
        side = max(min(height // 5, width), 1)
        top = max((height - 5 * max(height // 5, 1)) // 2, 0)
        left = min(top, width - side)
        down, across = (height - top) // side, (width - left) // side
        turned, colour = jax.random.split(key)
        values = bump(self.norm, side)
        is_turned = jax.random.bernoulli(turned, 0.5, (down, across, 1, 1))
        values = jnp.where(is_turned, values[None, None], values.T[None, None])
        tiles = values[..., None] * _signs(colour, (down, across, 1, 1, channels), x.dtype)
        tiles = jnp.moveaxis(tiles, 2, 1).reshape(down * side, across * side, channels)
        delta = jnp.zeros_like(x).at[top:top + down * side, left:left + across * side].set(tiles)
        return self._onto_ball(x, delta, eps)

    def _window(self, key, x, best, *, eps, stage):
        height, width, channels = x.shape
        side = jnp.asarray([side for _, side in self.sides], jnp.int32)[stage]
        key, one, other, turned = jax.random.split(key, 4)
        top, left, inside = _place(one, side, height, width)
        if self.norm == "linf":
            change = 2 * eps * _signs(key, (1, 1, channels), x.dtype) * inside
            return jnp.clip(jnp.clip(best + change, x - eps, x + eps), 0, 1)
        delta = best - x
        _, _, emptied = _place(other, side, height, width)
        size = _l2 if self.norm == "l2" else _l1
        shape = jnp.asarray(self._bumps(height, width))[stage, jax.random.bernoulli(turned).astype(jnp.int32)]
        shape = jnp.roll(shape, (top, left), (0, 1))[..., None] * _signs(key, (1, 1, channels), x.dtype)
        old = delta * inside
        new = shape + old / (1e-12 + size(old))
        new = new / (1e-12 + size(new))
        windows = size(delta * jnp.maximum(inside, emptied))
        if self.norm == "l2":
            left_over = jnp.maximum(eps**2 - jnp.sum(delta**2), 0) / channels
            new *= jnp.sqrt(left_over + windows**2)
        else:
            left_over = jnp.maximum(eps - jnp.sum(jnp.abs(delta)), 0) / channels
            new *= (left_over + windows) * channels
        return self._onto_ball(x, delta * (1 - emptied) * (1 - inside) + new, eps)

    def _onto_ball(self, x, delta, eps):
        if self.norm == "l2":
            return jnp.clip(x + eps * balls.normalized(delta[None])[0], 0, 1)
        return balls.project((x + delta)[None], x[None], eps, "l1")[0]


def _signs(key, shape, dtype):
    return jax.random.rademacher(key, shape, dtype)


def _place(key, side, height, width):
    """The upper left corner of a window that lies in the image, and its mask (H, W, 1)."""
    down, across = jax.random.split(key)
    top = jax.random.randint(down, (), 0, height - side + 1, jnp.int32)
    left = jax.random.randint(across, (), 0, width - side + 1, jnp.int32)
    rows, columns = (np.arange(n, dtype=np.int32) for n in (height, width))
    rows, columns = rows[:, None, None], columns[None, :, None]
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return top, left, inside.astype(jnp.float32)


def _l2(values):
    """(H, W, C) -> (1, 1, C)."""
    return jnp.sqrt(jnp.sum(values**2, (0, 1), keepdims=True))


def _l1(values):
    return jnp.sum(jnp.abs(values), (0, 1), keepdims=True)
