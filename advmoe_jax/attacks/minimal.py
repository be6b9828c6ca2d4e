"""What attacks that look for the smallest perturbation share.

What they find does not depend on the scale of the logits. Two are so defined that it does: C&W's constants are in units
of the logits, and DDN's direction is that of the cross-entropy, which with more than two classes weighs them by it.

x images (B, H, W, C) in [0, 1], d = H * W * C, K classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives
from advmoe_jax.ops import balls, losses


def none_yet(x: jax.Array) -> dict[str, jax.Array]:
    """No misclassified image yet: {"nearest": images, "distance": (B,) infinite, "within": (B,) whether within eps}."""
    return dict(nearest=x, distance=jnp.full(x.shape[0], jnp.inf, x.dtype), within=jnp.zeros(x.shape[0], bool))


def nearer(known: dict[str, jax.Array], inputs: driver.Inputs, x_adv: jax.Array, broken: jax.Array, norm: str
           ) -> dict[str, jax.Array]:
    """What `none_yet` names: of `known`, or where x_adv is misclassified and nearer to the image, of x_adv."""
    distance = balls.norm(x_adv - inputs.rows["x"], norm)
    better = broken & (distance < known["distance"])
    return driver.select(better, dict(nearest=x_adv, distance=distance, within=distance <= inputs.scalars["eps"]),
                         {name: known[name] for name in ("nearest", "distance", "within")})


def finish(program: Any, inputs: driver.Inputs, carry: driver.Carry) -> dict[str, jax.Array]:
    """`finish` of programs with a `norm` and `beyond`: the nearest image as a candidate; its loss is -distance."""
    x, eps, x_adv, distance = inputs.rows["x"], inputs.scalars["eps"], carry["nearest"], carry["distance"]
    if program.beyond == "project":
        shrink = jnp.minimum(1, eps / jnp.maximum(distance, 1e-12))
        x_adv = balls.project(x + shrink[:, None, None, None] * (x_adv - x), x, eps, program.norm)
    elif program.beyond == "clean":
        x_adv = driver.select(carry["within"], x_adv, x)
    return dict(x=x_adv, loss=-distance, broken=carry["within"])


def attack_by(program: Callable[[int], driver.Program], numbers: dict[str, Any], num_steps: int, driver_name: str,
              targets: int = 0) -> build.Attack:
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
        inputs = build.inputs_of(logits_fn, key, x, y, **numbers)
        worst, ranking = objectives.clean(inputs, targets)
        made = program(ranking.shape[-1])
        inputs = inputs._replace(rows=inputs.rows | ({"targets": ranking} if targets else {}))
        worst = driver.rounds(lambda inputs, _: driver.run(made, inputs, num_steps, driver_name), inputs, worst, 1,
                              stops=True)
        return jax.lax.stop_gradient(worst["x"])

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
