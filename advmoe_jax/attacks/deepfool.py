"""DeepFool: steps to the nearest linearised boundary (Moosavi-Dezfooli et al., CVPR 2016, algorithm 2).

x images (B, H, W, C) in [0, 1], K classes, T of them candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, minimal, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.ops import balls

_BEYOND_THE_PLANE = 1e-4  # added to the logit difference that a step closes
ABOUT = About(("linf", "l2"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of DeepFool.

    Attributes:
        num_steps: steps at most; an image is left alone once its class changes.
        overshoot: share by which the whole perturbation is lengthened, 0 or more.
        candidates: classes of the largest clean logits that are considered, the label among them, 2 or more.
        norm ("linf" | "l2"), eps, beyond, driver: see attacks.settings.
    """

    norm: str = "linf"
    eps: str | float = "8/255"
    num_steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10
    beyond: str = "clean"
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "deepfool", "deepfool-20"."""
    return "deepfool" if config.num_steps == 50 else f"deepfool-{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as minimal.attack_by does; it draws nothing."""
    numbers = settings.read("deepfool", config, ABOUT, num_steps=1, candidates=2, overshoot="0 or more")
    return minimal.attack_by(lambda ranked: _DeepFool(config.norm, config.beyond, cost=(1, ranked)), numbers,
                             config.num_steps + 1, config.driver, config.candidates - 1)


@dataclasses.dataclass(frozen=True)
class _DeepFool:
    """The attack as a `driver.Program`; step i looks at iterate i and then moves it; the last move is not used."""

    norm: str
    beyond: str
    cost: tuple[int, int]
    stops = True
    finish = minimal.finish

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x = inputs.rows["x"]
        return dict(x=x, total=jnp.zeros_like(x), **minimal.none_yet(x))

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        x, y = inputs.rows["x"], inputs.rows["y"]
        logits, gaps, normals = self._planes(inputs, carry["x"])
        nearest = minimal.nearer(carry, inputs, carry["x"], objectives.misclassified(logits, y), self.norm)
        dual = "l1" if self.norm == "linf" else "l2"
        lengths = jnp.maximum(jax.vmap(lambda normal: balls.norm(normal, dual))(normals), 1e-12)
        plane = jnp.argmin(jnp.abs(gaps) / lengths, 0), jnp.arange(x.shape[0])
        far = (jnp.abs(gaps[plane]) + _BEYOND_THE_PLANE) / lengths[plane]
        normal = normals[plane]
        direction = jnp.sign(normal) if self.norm == "linf" else balls.normalized(normal)
        total = carry["total"] + far[:, None, None, None] * direction
        moved = jnp.clip(x + (1 + inputs.scalars["overshoot"]) * total, 0, 1)
        return nearest | dict(x=moved, total=total)

    def done(self, carry: driver.Carry) -> jax.Array:
        return jnp.isfinite(carry["distance"])

    def _planes(self, inputs, u):
        """Logits (B, K); of each candidate z_k - z_y (T, B) and its gradient (T, B, H, W, C)."""
        y, targets = inputs.rows["y"], inputs.rows["targets"]
        logits, pull = jax.vjp(inputs.logits_fn, u)
        one_hot = jax.nn.one_hot(targets.T, logits.shape[-1], dtype=logits.dtype)
        differences = one_hot - jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)[None]
        gaps = jnp.take_along_axis(logits, targets, -1) - jnp.take_along_axis(logits, y[:, None], -1)
        normals = jax.vmap(lambda cotangent: pull(cotangent)[0])(differences)
        return logits, gaps.T, jnp.nan_to_num(normals)
