"""RayS: a search for the nearest boundary along rays of signs that sees labels only (Chen & Gu, KDD 2020).

x images (B, H, W, C) in [0, 1], d = H * W * C; a ray is x + r s with signs s and a radius r in pixel units, cut to the
box, so that a radius of 1 is a corner of it. Its l2 length before that is r sqrt(d).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, driver, minimal, settings
from advmoe_jax.attacks.about import About

_TOLERANCE = 1e-3  # of a radius, as an l2 length
_NO_CLASS = -1
ABOUT = About(("linf", "l2"), takes="values")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of RayS; the defaults are the authors'. The norm is that in which the nearest image is kept; the search
    is the same."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps()
    num_queries: int = settings.count(10000, "labels that the attack may ask for, that of the clean image among them")
    beyond: str = settings.beyond()
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "rays", "rays-1000"."""
    return "rays" if config.num_queries == 10000 else f"rays-{config.num_queries}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; it draws nothing.

    Images that are misclassified when clean come back as they are.
    """
    config = settings.read("rays", config)
    program = _RayS(config.norm, config.beyond, config.early_stop)
    return build.one_run(program, config.num_queries, config.driver, eps=config.eps)


def _labels(logits_fn, x):
    """All that the attack sees of a model: labels (B,). Logits with a NaN have no class."""
    logits = jax.lax.stop_gradient(logits_fn(x))
    return jnp.where(jnp.any(jnp.isnan(logits), -1), _NO_CLASS, jnp.argmax(logits, -1))


def block(level: jax.Array, number: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """The first coordinate of a block of 1 / 2^level of them all, rounded up, and the one after its last."""
    size = (dim + 2**level - 1) // 2**level
    return number * size, jnp.minimum((number + 1) * size, dim)


@dataclasses.dataclass(frozen=True)
class _RayS:
    """The attack as a `driver.Program`; a step is one query.

    Each image is searched alone. Its signs are tried at its best radius with one block flipped. If that changes the
    class, the radius is bisected, one query a step. Then comes the next block, or the first one of half the size.
    """

    norm: str
    beyond: str
    early_stop: bool
    stops = True
    cost = (1, 0)

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x = inputs.rows["x"]
        zero, no = jnp.zeros(x.shape[0], x.dtype), jnp.zeros(x.shape[0], bool)
        none = jnp.zeros(x.shape[0], jnp.int32)
        return dict(**minimal.none_yet(x), signs=jnp.ones_like(x), radius=zero + jnp.inf, low=zero, high=zero,
                    bisecting=no, level=none, block=none, queries=none, through=no)

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        x, y = inputs.rows["x"], inputs.rows["y"]
        dim = x[0].size
        first, end = block(carry["level"], carry["block"], dim)
        places = _places(x.shape[1:])
        flipped = (places >= _column(first)) & (places < _column(end))
        signs = jnp.where(flipped, -carry["signs"], carry["signs"])
        middle = (carry["low"] + carry["high"]) / 2
        radius = jnp.where(carry["bisecting"], middle, carry["radius"])
        radius = jnp.where(i == 0, 0, radius)  # the clean image
        u = jnp.clip(x + _column(radius) * signs, 0, 1)
        broken = _labels(inputs.logits_fn, u) != y
        new = dict(carry) | minimal.nearer(carry, inputs, u, broken, self.norm)
        new["queries"] += 1

        tried = ~carry["bisecting"] & (i > 0)
        new["low"] = jnp.where(carry["bisecting"], jnp.where(broken, carry["low"], middle), 0)
        new["high"] = jnp.where(carry["bisecting"], jnp.where(broken, middle, carry["high"]),
                                jnp.minimum(carry["radius"], 1))
        bisected = carry["bisecting"] & (new["high"] - new["low"] <= _TOLERANCE / math.sqrt(dim))
        new["bisecting"] = (carry["bisecting"] & ~bisected) | (tried & broken)
        better = bisected & (new["high"] < carry["radius"])
        new["radius"] = jnp.where(better, new["high"], carry["radius"])
        new["signs"] = driver.select(better, signs, carry["signs"])

        next_block = bisected | (tried & ~broken)
        last = end == dim
        smallest = math.ceil(math.log2(dim))
        new["level"] = jnp.minimum(carry["level"] + (next_block & last).astype(jnp.int32), smallest)
        new["block"] = jnp.where(next_block, jnp.where(last, 0, carry["block"] + 1), carry["block"])
        new["through"] = new["within"] if self.early_stop else new["distance"] <= 0
        return new

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["through"]

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return minimal.finish(self, inputs, carry) | dict(queries=carry["queries"])


def _column(value):
    return value[:, None, None, None]


def _places(shape):
    """(1, H, W, C): where each coordinate is when channels come first, as in the reference code."""
    height, width, channels = shape
    places = np.arange(height * width * channels, dtype=np.int32).reshape(channels, height, width)
    return np.moveaxis(places, 0, -1)[None]
