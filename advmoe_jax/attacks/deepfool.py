"""DeepFool: steps to the nearest linearised boundary (Moosavi-Dezfooli et al., CVPR 2016, algorithm 2).

x images (B, H, W, C) in [0, 1], K classes, T of them candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, minimal, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls, hyperplanes

_BEYOND_THE_PLANE = 1e-5  # added to the length of a step, so that a tie is left too
ABOUT = About(("linf", "l2"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of DeepFool."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps()
    num_steps: int = settings.count(50, "steps at most; an image is left alone once its class changes")
    overshoot: float = setting(0.02, "share by which the whole perturbation is lengthened", least=0, most=100)
    candidates: int = settings.count(10, "classes of the largest clean logits that are considered, with the label",
                                     least=2)
    beyond: str = settings.beyond()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "deepfool", "deepfool-20"."""
    return "deepfool" if config.num_steps == 50 else f"deepfool-{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as minimal.attack_by does; it draws nothing."""
    config = settings.read("deepfool", config)
    return minimal.attack_by(lambda ranked: _DeepFool(config.norm, config.beyond, cost=(1, ranked)),
                             dict(eps=config.eps, overshoot=config.overshoot), config.num_steps + 1, config.driver,
                             config.candidates - 1)


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
        distances = hyperplanes.distance(gaps, normals.reshape(*gaps.shape, -1), self.norm)
        plane = jnp.argmin(distances, 0), jnp.arange(x.shape[0])
        far = jnp.where(jnp.isinf(distances[plane]), 0, distances[plane] + _BEYOND_THE_PLANE)
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
