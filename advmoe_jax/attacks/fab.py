"""The fast adaptive boundary attack: the smallest perturbation that changes the class (Croce & Hein, ICML 2020).

x images (B, H, W, C) in [0, 1], d = H * W * C, K classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, minimal, objectives, settings
from advmoe_jax.core import rng
from advmoe_jax.ops import balls, hyperplanes

_MOST_TOWARDS_CLEAN = 0.1  # alpha_max
_BEYOND_THE_PLANE = 1.05  # eta
_BACK = 0.9  # beta
NORMS = balls.NORMS


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of FAB; the defaults are AutoAttack's FAB-T.

    Attributes:
        norm: "linf" | "l2" | "l1".
        eps: budget, a number or a fraction such as "8/255".
        num_steps: steps in each restart.
        restarts: for each target; the first one starts at the image, the others at random.
        targets: classes that are aimed at one after the other, by falling clean logit, at most K - 1; 0 for the class
            of the nearest plane in each step, at K backward passes.
        beyond: see attacks.settings.
        early_stop: as in pgd.Config: whether an image is left alone once the perturbation is within eps.
        driver: see attacks.driver.
    """

    norm: str = "linf"
    eps: str | float = "8/255"
    num_steps: int = 100
    restarts: int = 1
    targets: int = 9
    beyond: str = "clean"
    early_stop: bool = False
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "fab", "fab-t", with another number of steps than 100 "fab-t-20"."""
    name = "fab-t" if config.targets else "fab"
    return name if config.num_steps == 100 else f"{name}-{config.num_steps}"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    Images that are misclassified when clean come back as they are.

    Raises:
        UserError: a setting is out of range.
    """
    eps = settings.budget("fab", config, NORMS, num_steps=1, restarts=1, targets=0)

    def attack(logits_fn, key, x, y):
        logits_fn = objectives.partial(logits_fn, x)
        rows = dict(keys=rng.rowwise(key, x.shape[0]), x=x, y=y)
        planes = 1 if config.targets else jax.eval_shape(logits_fn, x).shape[-1]
        program = _FAB(config.norm, planes, config.beyond, config.early_stop)
        worst, targets = objectives.clean(logits_fn, rows, config.targets)

        def one(inputs, number):
            rows = inputs.rows | {"keys": rng.fold_in(inputs.rows["keys"], number)}
            if config.targets:
                rows["target"] = rows.pop("targets")[:, number // config.restarts]
            scalars = inputs.scalars | {"is_first": number % config.restarts == 0}
            return driver.run(program, inputs._replace(rows=rows, scalars=scalars), config.num_steps, config.driver)

        inputs = driver.Inputs(logits_fn, rows | ({"targets": targets} if config.targets else {}),
                               dict(eps=jnp.asarray(eps, x.dtype)))
        num_rounds = config.restarts * max(targets.shape[-1], 1)
        return jax.lax.stop_gradient(driver.rounds(one, inputs, worst, num_rounds, stops=True)["x"])

    return attack


@dataclasses.dataclass(frozen=True)
class _FAB:
    """One run as a `driver.Program`; planes is 1 with a target, else K. The scalar "is_first" says where it starts."""

    norm: str
    planes: int
    beyond: str
    stops: bool

    @property
    def cost(self):
        return 2, self.planes

    def start(self, inputs: driver.Inputs) -> Any:
        x, eps = inputs.rows["x"], inputs.scalars["eps"]
        draw = jax.random.uniform if self.norm == "linf" else jax.random.normal
        limits = (-1, 1) if self.norm == "linf" else ()
        noise = jax.vmap(lambda k: draw(k, x.shape[1:], x.dtype, *limits))(inputs.rows["keys"])
        away = jnp.clip(x + eps / 2 * noise / balls.norm(noise, self.norm)[:, None, None, None], 0, 1)
        u = jnp.where(inputs.scalars["is_first"], x, away)
        return dict(x=u, **minimal.none_yet(x), within=jnp.zeros(x.shape[0], bool))

    def step(self, inputs: driver.Inputs, carry: Any, i: jax.Array) -> Any:
        x, u, y = inputs.rows["x"], carry["x"], inputs.rows["y"]
        gap, normal = self._nearest_plane(inputs, u)
        flat = u.reshape(u.shape[0], -1)
        offset = jnp.sum(normal * flat, -1) - gap
        both, twice = jnp.concatenate([flat, x.reshape(flat.shape)]), jnp.concatenate([normal, normal])
        to_plane, clean_to_plane = hyperplanes.displacement(
            both, twice, jnp.concatenate([offset, offset]), self.norm).reshape(2, *x.shape)
        near, far = (jnp.maximum(balls.norm(v, self.norm), 1e-8) for v in (to_plane, clean_to_plane))
        alpha = jnp.minimum(near / (near + far), _MOST_TOWARDS_CLEAN)[:, None, None, None]
        u = jnp.clip((1 - alpha) * (u + _BEYOND_THE_PLANE * to_plane)
                     + alpha * (x + _BEYOND_THE_PLANE * clean_to_plane), 0, 1)
        broken = objectives.misclassified(inputs.logits_fn(u), y)
        found = minimal.nearer(carry, x, u, broken, self.norm)
        u = jnp.where(broken[:, None, None, None], x + _BACK * (u - x), u)
        return dict(x=u, **found, within=found["distance"] <= inputs.scalars["eps"])

    def done(self, carry: Any) -> jax.Array:
        return carry["within"]

    def finish(self, inputs: driver.Inputs, carry: Any) -> Any:
        return minimal.candidate(carry, inputs.rows["x"], inputs.scalars["eps"], self.norm, self.beyond)

    def _nearest_plane(self, inputs, u):
        """The linearised difference z_k - z_y of the class to go to: its value (B,) and gradient (B, d)."""
        y, size = inputs.rows["y"], u.shape[0]
        if self.planes == 1:
            def total(v):
                gap = objectives.TARGETED["margin"].loss(inputs.logits_fn(v), (y, inputs.rows["target"]))
                return jnp.sum(gap), gap

            grad, gap = jax.grad(total, has_aux=True)(u)
            return gap, jnp.nan_to_num(grad).reshape(size, -1)
        gaps, normals = minimal.differences(inputs.logits_fn, u, y)
        normals = jnp.nan_to_num(normals)
        dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[self.norm]
        lengths = jnp.stack([balls.norm(normal.reshape(u.shape), dual) for normal in jnp.moveaxis(normals, 1, 0)], 1)
        nearest = jnp.argmin(jnp.where(jnp.isinf(gaps), jnp.inf, jnp.abs(gaps) / (lengths + 1e-12)), -1)
        pick = jnp.arange(size)
        return gaps[pick, nearest], normals[pick, nearest]
