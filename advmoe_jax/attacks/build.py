"""From a program to an attack: what the `make` functions of attacks share.

B images (H, W, C) in [0, 1], K classes. An attack is `attack(logits_fn, key, x, y) -> x_adv`, see pgd.make.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import checks, driver, objectives
from advmoe_jax.core import rng

Attack = Callable[..., jax.Array]


def inputs_of(model_fn: Callable, key: jax.Array, x: jax.Array, y: Any, with_keys: bool = False,
              takes: str | None = "logits", **numbers: Any) -> driver.Inputs:
    """Inputs of a program, with the rows "keys", "x", "y".

    Args:
        model_fn, key, x, y: of the attack, see pgd.make.
        with_keys: whether `model_fn` takes keys (B,) too.
        takes: what `model_fn` is, see About; None: `y` is not labels, and the model is not looked at.
        numbers: scalars of the program; they get the type of the images.
    Raises:
        UserError: one of these cannot be attacked, see attacks.checks.
    """
    x = jnp.asarray(checks.images(x))
    keys = rng.rowwise(key, x.shape[0])
    more = (keys,) if with_keys else ()
    model_fn = objectives.partial(model_fn, x, *more)
    if takes is not None:
        y = checks.labels(y, x.shape[0], checks.classes(takes, model_fn, x, *more))
    scalars = jax.tree.map(lambda number: jnp.asarray(number, x.dtype), numbers)
    return driver.Inputs(model_fn, dict(keys=keys, x=x, y=y), scalars)


def noise(keys: jax.Array, x: jax.Array, norm: str) -> jax.Array:
    """Noise of the shape of images: for linf uniform in [-1, 1], else Gaussian."""
    draw, limits = (jax.random.uniform, (-1, 1)) if norm == "linf" else (jax.random.normal, ())
    return jax.vmap(lambda key: draw(key, x.shape[1:], x.dtype, *limits))(keys)


def one_run(program: driver.Program, num_steps: int, driver_name: str, **numbers: Any) -> Attack:
    """The attack that runs a program once."""
    def attack(logits_fn, key, x, y):
        result = driver.run(program, inputs_of(logits_fn, key, x, y, **numbers), num_steps, driver_name)
        return jax.lax.stop_gradient(result["x"])

    return attack


def of_images(transform: Callable[[jax.Array, jax.Array], jax.Array]) -> Attack:
    """The attack that gives transform(keys (B,), x), whatever the model and `y`."""
    def attack(logits_fn, key, x, y):
        x = jnp.asarray(checks.images(x))
        return jax.lax.stop_gradient(transform(rng.rowwise(key, x.shape[0]), x))

    return attack


def over_targets(one: Callable[[driver.Inputs, bool], dict[str, jax.Array]], inputs: driver.Inputs, targets: int = 0,
                 restarts: int = 1, noisy: bool = False,
                 success: Callable[[Any, Any], jax.Array] = objectives.misclassified) -> jax.Array:
    """The worst images over restarts, for each target. Images that are broken when clean stay as they are.

    Args:
        one: `(inputs, whether this is the first restart) -> candidate`. With targets, the rows have a "target" (B,).
            Each call has keys of its own.
        inputs: of `inputs_of`.
        targets: how many classes are aimed at, by falling clean logit, at most K - 1; 0 for none.
        restarts: for each target.
        noisy: whether the model takes keys (B,) too.
        success: whether outputs are those of broken images, see objectives.Objective.
    """
    worst, ranking = objectives.clean(inputs, targets, noisy, success)

    def round_of(inputs, number):
        rows = inputs.rows | {"keys": rng.fold_in(inputs.rows["keys"], number)}
        if targets:
            rows["target"] = rows.pop("targets")[:, number // restarts]
        return one(inputs._replace(rows=rows), number % restarts == 0)

    inputs = inputs._replace(rows=inputs.rows | ({"targets": ranking} if targets else {}))
    num_rounds = restarts * max(ranking.shape[-1], 1)
    return jax.lax.stop_gradient(driver.rounds(round_of, inputs, worst, num_rounds, stops=True)["x"])
