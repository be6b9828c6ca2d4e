"""The fast adaptive boundary attack: the smallest perturbation that changes the class (Croce & Hein, ICML 2020).

x images (B, H, W, C) in [0, 1], d = H * W * C, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, minimal, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.ops import balls, hyperplanes

_MOST_TOWARDS_CLEAN = 0.1  # alpha_max
_BEYOND_THE_PLANE = 1.05  # eta
_BACK = 0.9  # beta
ABOUT = About(balls.NORMS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of FAB; the defaults are AutoAttack's FAB-T.

    Attributes:
        num_steps: steps in each restart.
        restarts: for each target; the first one starts at the image, the others at random.
        targets: classes that are aimed at one after the other, by falling clean logit, at most K - 1; 0 for the class
            of the nearest plane in each step, at K backward passes.
        norm, eps, beyond, early_stop, driver: see attacks.settings.
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


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    Images that are misclassified when clean come back as they are.
    """
    eps = settings.read("fab", config, ABOUT, num_steps=1, restarts=1, targets=0)["eps"]

    def attack(logits_fn, key, x, y):
        inputs = build.inputs_of(logits_fn, key, x, y, eps=eps)
        planes = 1 if config.targets else jax.eval_shape(inputs.logits_fn, x).shape[-1]
        program = _FAB(config.norm, planes, config.beyond, config.early_stop)

        def one(inputs, is_first):
            inputs = inputs._replace(scalars=inputs.scalars | {"is_first": is_first})
            return driver.run(program, inputs, config.num_steps, config.driver)

        return build.over_targets(one, inputs, config.targets, config.restarts)

    return attack


@dataclasses.dataclass(frozen=True)
class _FAB:
    """One run as a `driver.Program`; planes is 1 with a target, else K. It starts at the image if "is_first", else at
    random."""

    norm: str
    planes: int
    beyond: str
    stops: bool
    finish = minimal.finish

    @property
    def cost(self):
        return 2, self.planes

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x, eps = inputs.rows["x"], inputs.scalars["eps"]
        noise = build.noise(inputs.rows["keys"], x, self.norm)
        away = jnp.clip(x + eps / 2 * noise / balls.norm(noise, self.norm)[:, None, None, None], 0, 1)
        u = jnp.where(inputs.scalars["is_first"], x, away)
        return dict(x=u, **minimal.none_yet(x))

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
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
        nearest = minimal.nearer(carry, inputs, u, broken, self.norm)
        u = jnp.where(broken[:, None, None, None], x + _BACK * (u - x), u)
        return dict(x=u, **nearest)

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry["within"]

    def _nearest_plane(self, inputs, u):
        """The linearised difference z_k - z_y of the class to go to: its value (B,) and gradient (B, d)."""
        y, size = inputs.rows["y"], u.shape[0]
        if self.planes == 1:
            margin, labels = objectives.TARGETED["margin"], (y, inputs.rows["target"])
            gap, grad, _ = objectives.gradient(margin, inputs.logits_fn, u, labels)
            return gap, jnp.nan_to_num(grad).reshape(size, -1)
        gaps, normals = minimal.differences(inputs.logits_fn, u, y)
        normals = jnp.nan_to_num(normals)
        dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[self.norm]
        lengths = jnp.stack([balls.norm(normal.reshape(u.shape), dual) for normal in jnp.moveaxis(normals, 1, 0)], 1)
        nearest = jnp.argmin(jnp.where(jnp.isinf(gaps), jnp.inf, jnp.abs(gaps) / (lengths + 1e-12)), -1)
        pick = jnp.arange(size)
        return gaps[pick, nearest], normals[pick, nearest]
