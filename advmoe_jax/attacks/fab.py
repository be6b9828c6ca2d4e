"""The fast adaptive boundary attack: the smallest perturbation that changes the class (Croce & Hein, ICML 2020).

x images (B, H, W, C) in [0, 1], d = H * W * C, K classes.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, checks, driver, minimal, objectives, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.ops import balls, hyperplanes

_MOST_TOWARDS_CLEAN = 0.1  # alpha_max
_BEYOND_THE_PLANE = 1.05  # eta
_BACK = 0.9  # beta
ABOUT = About(balls.NORMS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of FAB; the defaults are AutoAttack's FAB-T."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps()
    num_steps: int = settings.count(100, "steps in each restart")
    restarts: int = settings.count(1, "for each target; the first one starts at the image, the others at random")
    targets: int = settings.count(9, "classes that are aimed at one after the other, by falling clean logit, at most "
                                     "K - 1; 0 for the class of the nearest plane in each step, at K backward passes",
                                  least=0)
    beyond: str = settings.beyond()
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "fab", "fab-t", with another number of steps than 100 "fab-t-20"."""
    name = "fab-t" if config.targets else "fab"
    return name if config.num_steps == 100 else f"{name}-{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    Images that are misclassified when clean come back as they are.
    """
    config = settings.read("fab", config)

    def attack(logits_fn, key, x, y):
        inputs = build.inputs_of(logits_fn, key, x, y, eps=config.eps)
        planes = 1 if config.targets else checks.classes("logits", inputs.logits_fn, inputs.rows["x"])
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
        nearest = jnp.argmin(hyperplanes.distance(gaps, normals, self.norm), -1)
        pick = jnp.arange(size)
        return gaps[pick, nearest], normals[pick, nearest]
