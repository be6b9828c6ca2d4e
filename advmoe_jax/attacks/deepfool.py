"""DeepFool: steps to the nearest linearised boundary (Moosavi-Dezfooli et al., CVPR 2016, algorithm 2).

x images (B, H, W, C) in [0, 1], K classes, T of them candidates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, minimal, objectives, settings
from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls

_BEYOND_THE_PLANE = 1e-4  # added to the logit difference that a step closes
NORMS = ("linf", "l2")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of DeepFool.

    Attributes:
        norm: "linf" | "l2".
        eps: budget, a number or a fraction such as "8/255".
        num_steps: steps at most; an image is left alone once its class changes.
        overshoot: share by which the whole perturbation is lengthened, 0 or more.
        candidates: classes of the largest clean logits that are considered, the label among them, 2 or more.
        beyond: see attacks.settings.
        driver: see attacks.driver.
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


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does; it draws nothing.

    Images that are misclassified when clean come back as they are.

    Raises:
        UserError: a setting is out of range.
    """
    eps = settings.budget("deepfool", config, NORMS, num_steps=1, candidates=2)
    overshoot = units.number(config.overshoot, "deepfool's overshoot")
    if overshoot < 0:
        raise UserError(f"deepfool has overshoot={config.overshoot}: expected 0 or more")
    program = functools.partial(_DeepFool, config.norm, config.beyond)
    return minimal.attack_by(program, dict(eps=eps, overshoot=overshoot), config.num_steps + 1, config.driver,
                             config.candidates - 1)


@dataclasses.dataclass(frozen=True)
class _DeepFool:
    """The attack as a `driver.Program`; step i looks at iterate i and then moves, in vain after the last look."""

    norm: str
    beyond: str
    num_targets: int
    stops = True

    @property
    def cost(self):
        return 1, self.num_targets

    def start(self, inputs: driver.Inputs) -> Any:
        x = inputs.rows["x"]
        return dict(x=x, total=jnp.zeros_like(x), **minimal.none_yet(x))

    def step(self, inputs: driver.Inputs, carry: Any, i: jax.Array) -> Any:
        x, y = inputs.rows["x"], inputs.rows["y"]
        logits, gaps, normals = self._planes(inputs, carry["x"])
        found = minimal.nearer(carry, x, carry["x"], objectives.misclassified(logits, y), self.norm)
        dual = "l1" if self.norm == "linf" else "l2"
        lengths = jnp.maximum(jax.vmap(lambda normal: balls.norm(normal, dual))(normals), 1e-12)
        nearest = jnp.argmin(jnp.abs(gaps) / lengths, 0), jnp.arange(x.shape[0])
        far = (jnp.abs(gaps[nearest]) + _BEYOND_THE_PLANE) / lengths[nearest]
        normal = normals[nearest]
        direction = jnp.sign(normal) if self.norm == "linf" else balls.normalized(normal)
        total = carry["total"] + far[:, None, None, None] * direction
        moved = jnp.clip(x + (1 + inputs.scalars["overshoot"]) * total, 0, 1)
        return found | dict(x=moved, total=total)

    def done(self, carry: Any) -> jax.Array:
        return jnp.isfinite(carry["distance"])

    def finish(self, inputs: driver.Inputs, carry: Any) -> Any:
        return minimal.candidate(carry, inputs.rows["x"], inputs.scalars["eps"], self.norm, self.beyond)

    def _planes(self, inputs, u):
        """Logits (B, K); of each candidate z_k - z_y (T, B) and its gradient (T, B, H, W, C)."""
        y, targets = inputs.rows["y"], inputs.rows["targets"]
        logits, pull = jax.vjp(inputs.logits_fn, u)
        one_hot = jax.nn.one_hot(targets.T, logits.shape[-1], dtype=logits.dtype)
        differences = one_hot - jax.nn.one_hot(y, logits.shape[-1], dtype=logits.dtype)[None]
        gaps = jnp.take_along_axis(logits, targets, -1) - jnp.take_along_axis(logits, y[:, None], -1)
        normals = jax.vmap(lambda cotangent: pull(cotangent)[0])(differences)
        return logits, gaps.T, jnp.nan_to_num(normals)
