"""What attacks that look for the smallest perturbation share.

x images (B, H, W, C) in [0, 1], d = H * W * C, K classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, objectives
from advmoe_jax.core import rng
from advmoe_jax.ops import balls, losses


def none_yet(x: jax.Array) -> dict[str, jax.Array]:
    """Nothing found: {"found": images, "distance": (B,) infinite}."""
    return dict(found=x, distance=jnp.full(x.shape[0], jnp.inf, x.dtype))


def nearer(known: dict[str, jax.Array], x: jax.Array, x_adv: jax.Array, broken: jax.Array, norm: str
           ) -> dict[str, jax.Array]:
    """`known` with the rows of x_adv that are misclassified and nearer to x."""
    distance = balls.norm(x_adv - x, norm)
    better = broken & (distance < known["distance"])
    return driver.select(better, dict(found=x_adv, distance=distance),
                         {name: known[name] for name in ("found", "distance")})


def candidate(known: dict[str, Any], x: jax.Array, eps: jax.Array, norm: str, beyond: str) -> dict[str, jax.Array]:
    """A driver's candidate of what was found; its loss is the negative distance."""
    within = known["distance"] <= eps
    x_adv = known["found"]
    if beyond == "project":
        shrink = jnp.minimum(1, eps / jnp.maximum(known["distance"], 1e-12))
        x_adv = balls.project(x + shrink[:, None, None, None] * (x_adv - x), x, eps, norm)
    elif beyond == "clean":
        x_adv = driver.select(within, x_adv, x)
    return dict(x=x_adv, loss=-known["distance"], broken=within)


def attack_by(program: Callable[[int], driver.Program], numbers: dict[str, float], num_steps: int, driver_name: str,
              targets: int = 0) -> Callable[..., jax.Array]:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does.

    Images that are misclassified when clean come back as they are.

    Args:
        program: of the number of classes that are ranked, min(targets, K - 1).
        numbers: the program's scalars.
        num_steps: of the program.
        driver_name: see attacks.driver.
        targets: how many classes to rank by falling clean logit, in the program's rows "targets".
    """
    def attack(logits_fn, key, x, y):
        logits_fn = objectives.partial(logits_fn, x)
        rows = dict(keys=rng.rowwise(key, x.shape[0]), x=x, y=y)
        worst, ranking = objectives.clean(logits_fn, rows, targets)
        made = program(ranking.shape[-1])
        inputs = driver.Inputs(logits_fn, rows | ({"targets": ranking} if targets else {}),
                               {name: jnp.asarray(n, x.dtype) for name, n in numbers.items()})
        found = driver.rounds(lambda inputs, _: driver.run(made, inputs, num_steps, driver_name), inputs, worst, 1,
                              stops=True)
        return jax.lax.stop_gradient(found["x"])

    return attack


def differences(logits_fn: jax.tree_util.Partial, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """z_k - z_y of every class, -inf for k = y, and the gradients, by one forward and K backward passes.

    Returns:
        (B, K), (B, K, d).
    """
    logits, pull = jax.vjp(logits_fn, x)
    size, classes = logits.shape
    rows = jax.vmap(lambda k: pull(jax.nn.one_hot(jnp.full(size, k), classes, dtype=logits.dtype))[0])(
        jnp.arange(classes))
    rows = jnp.moveaxis(rows, 0, 1).reshape(size, classes, -1)
    label = jnp.arange(size), y
    return losses.others(logits, y) - logits[label][:, None], rows - rows[label][:, None]
