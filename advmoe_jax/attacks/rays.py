"""RayS: a search for the nearest boundary along rays of signs that sees labels only (Chen & Gu, KDD 2020).

x images (B, H, W, C) in [0, 1], d = H * W * C; a ray is x + r s with signs s and a radius r in pixel units, cut to the
box, so that a radius of 1 is a corner of it. Its l2 length before that is r sqrt(d).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import driver, minimal, objectives, settings

_TOLERANCE = 1e-3  # of a radius, as an l2 length
_NO_CLASS = -1
NORMS = ("linf", "l2")
TAKES = "values"  # see parse.Spec


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of RayS; the defaults are the authors'.

    Attributes:
        norm: "linf" | "l2", in which the nearest image is kept; the search is the same.
        eps: budget, a number or a fraction such as "8/255".
        num_queries: labels that the attack may ask for, that of the clean image among them.
        beyond: see attacks.settings.
        early_stop: as in fab.Config.
        driver: see attacks.driver.
    """

    norm: str = "linf"
    eps: str | float = "8/255"
    num_queries: int = 10000
    beyond: str = "clean"
    early_stop: bool = False
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "rays", "rays-1000"."""
    return "rays" if config.num_queries == 10000 else f"rays-{config.num_queries}"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; it draws nothing.

    Images that are misclassified when clean come back as they are.

    Raises:
        UserError: a setting is out of range.
    """
    eps = settings.budget("rays", config, NORMS, num_queries=1)
    program = _RayS(config.norm, config.beyond, config.early_stop)

    def attack(logits_fn, key, x, y):
        labels_fn = jax.tree_util.Partial(_labels, objectives.partial(logits_fn, x))
        inputs = driver.Inputs(labels_fn, dict(x=x, y=y), dict(eps=jnp.asarray(eps, x.dtype)))
        return jax.lax.stop_gradient(driver.run(program, inputs, config.num_queries, config.driver)["x"])

    return attack


def _labels(logits_fn, x):
    """All that the attack gets to see of a model, (B,); logits with a NaN are of no class."""
    logits = jax.lax.stop_gradient(logits_fn(x))
    return jnp.where(jnp.any(jnp.isnan(logits), -1), _NO_CLASS, jnp.argmax(logits, -1))


def block(level: jax.Array, number: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """The first coordinate of a block of 1 / 2^level of them all, rounded up, and the one after its last."""
    size = (dim + 2**level - 1) // 2**level
    return number * size, jnp.minimum((number + 1) * size, dim)


@dataclasses.dataclass(frozen=True)
class _RayS:
    """The attack as a `driver.Program`; a step is one query.

    Each image goes its own way: it tries the signs with one block flipped at its best radius; if that changes the class
    it bisects the radius, one query a step, and then comes the next block, or the first of half the size.
    """

    norm: str
    beyond: str
    early_stop: bool
    stops = True
    cost = (1, 0)

    def start(self, inputs: driver.Inputs) -> Any:
        x = inputs.rows["x"]
        zero, no = jnp.zeros(x.shape[0], x.dtype), jnp.zeros(x.shape[0], bool)
        none = jnp.zeros(x.shape[0], jnp.int32)
        return dict(**minimal.none_yet(x), signs=jnp.ones_like(x), radius=zero + jnp.inf, low=zero, high=zero,
                    bisecting=no, level=none, block=none, queries=none, through=no)

    def step(self, inputs: driver.Inputs, carry: Any, i: jax.Array) -> Any:
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
        broken = inputs.logits_fn(u) != y
        now = dict(carry) | minimal.nearer(carry, x, u, broken, self.norm)
        now["queries"] += 1

        tried = ~carry["bisecting"] & (i > 0)
        now["low"] = jnp.where(carry["bisecting"], jnp.where(broken, carry["low"], middle), 0)
        now["high"] = jnp.where(carry["bisecting"], jnp.where(broken, middle, carry["high"]),
                                jnp.minimum(carry["radius"], 1))
        found = carry["bisecting"] & (now["high"] - now["low"] <= _TOLERANCE / math.sqrt(dim))
        now["bisecting"] = (carry["bisecting"] & ~found) | (tried & broken)
        better = found & (now["high"] < carry["radius"])
        now["radius"] = jnp.where(better, now["high"], carry["radius"])
        now["signs"] = driver.select(better, signs, carry["signs"])

        next_block = found | (tried & ~broken)
        last = end == dim
        smallest = math.ceil(math.log2(dim))
        now["level"] = jnp.minimum(carry["level"] + (next_block & last), smallest)
        now["block"] = jnp.where(next_block, jnp.where(last, 0, carry["block"] + 1), carry["block"])
        now["through"] = now["distance"] <= (inputs.scalars["eps"] if self.early_stop else 0)
        return now

    def done(self, carry: Any) -> jax.Array:
        return carry["through"]

    def finish(self, inputs: driver.Inputs, carry: Any) -> Any:
        found = minimal.candidate(carry, inputs.rows["x"], inputs.scalars["eps"], self.norm, self.beyond)
        return found | dict(queries=carry["queries"])


def _column(value):
    return value[:, None, None, None]


def _places(shape):
    """(1, H, W, C): where each coordinate is when channels come first, as in the reference code."""
    height, width, channels = shape
    return np.moveaxis(np.arange(height * width * channels).reshape(channels, height, width), 0, -1)[None]
