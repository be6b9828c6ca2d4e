"""Multi steepest descent in the union of a linf, an l2 and an l1 ball (Maini et al., ICML 2020, algorithm 1).

x images (B, H, W, C) in [0, 1]; budgets and step sizes in the same units. For the accuracy under the union of the three
balls take the worst case of an attack in each; MSD is what a model is trained with.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives, sampling, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import rng, units
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls

_FEWEST, _MOST = 5, 20  # coordinates of an l1 step
ABOUT = About()


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of MSD; the defaults are the authors' for CIFAR-10. An image needs to keep one of the three budgets."""

    eps_linf: str | float = settings.eps("0.03")
    eps_l2: str | float = settings.eps("0.5")
    eps_l1: str | float = settings.eps("12")
    step_linf: str | float = setting("0.003", "size of linf steps, as pgd.Config's")
    step_l2: str | float = setting("0.05", "size of l2 steps")
    step_l1: str | float = setting("0.05", "how far each of 20 coordinates moves in an l1 step; fewer move further, so "
                                           "that the l1 size stays")
    num_steps: int = settings.count(50, "gradient steps, each with three more forward passes")
    early_stop: bool = settings.early_stop()
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "msd-50"."""
    return f"msd-{config.num_steps}"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.
    """
    config = settings.read("msd", config)
    eps, sizes = {}, {}
    for norm in balls.NORMS:
        eps[norm] = units.eps(getattr(config, f"eps_{norm}"), norm, f"eps_{norm}")
        step = f"step_{norm}"
        sizes[norm] = units.step_size(getattr(config, step), eps[norm], config.num_steps, norm, step)
    return build.one_run(_MSD(config.early_stop), config.num_steps, config.driver, eps=eps, sizes=sizes)


@dataclasses.dataclass(frozen=True)
class _MSD:
    """The attack as a `driver.Program`."""

    stops: bool
    cost = (4, 1)

    def start(self, inputs: driver.Inputs) -> driver.Carry:
        x = inputs.rows["x"]
        return x, driver.none_yet(x)

    def step(self, inputs: driver.Inputs, carry: driver.Carry, i: jax.Array) -> driver.Carry:
        u, best = carry
        x, y = inputs.rows["x"], inputs.rows["y"]
        eps, sizes = inputs.scalars["eps"], inputs.scalars["sizes"]
        keys = rng.fold_in(inputs.rows["keys"], i)
        grad = jnp.nan_to_num(objectives.gradient(objectives.NAMED["ce"], inputs.logits_fn, u, y)[1])
        ways = {norm: sizes[norm] * balls.steepest(grad, u, norm, keys) for norm in ("linf", "l2")}
        ways["l1"] = _l1_step(grad, u, sizes["l1"], keys)
        steepest = driver.none_yet(u)
        for norm, way in ways.items():
            moved = balls.project(u + way, x, eps[norm], norm)
            one = sampling.look(inputs, moved)
            steepest = driver.select(one["loss"] > steepest["loss"], one, steepest)
            best = driver.worse(best, one)
        return steepest["x"], best

    def done(self, carry: driver.Carry) -> jax.Array:
        return carry[1]["broken"]

    def finish(self, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
        return carry[1]


def _l1_step(grad, u, size, keys):
    """Moves the 5 to 20 coordinates of largest gradient that have room for it, each by 20 `size` over their number."""
    count = jax.vmap(lambda k: jax.random.randint(k, (), _FEWEST, _MOST + 1, jnp.int32))(keys)[:, None]
    flat, place = grad.reshape(grad.shape[0], -1), u.reshape(u.shape[0], -1)
    far = size * _MOST / count.astype(u.dtype)
    stuck = ((flat < 0) & (place <= far)) | ((flat > 0) & (place >= 1 - far))
    largest, where = jax.lax.top_k(jnp.where(stuck, 0, jnp.abs(flat)), min(_MOST, flat.shape[-1]))
    moves = (jnp.arange(largest.shape[-1], dtype=count.dtype)[None] < count) & (largest > 0)
    step = jnp.where(moves, far * jnp.sign(jnp.take_along_axis(flat, where, -1)), 0)
    return jnp.zeros_like(flat).at[jnp.arange(len(flat))[:, None], where].set(step).reshape(grad.shape)
