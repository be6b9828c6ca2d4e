"""Attacks on the parts of a model, its router or its members: several runs of PGD, of which each image keeps the worst.

A run is a list of phases, each of which starts where the one before it ended. B images.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, pgd, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.attacks.objectives import Objective
from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an attack with modes; all but `mode` are those of each run of PGD."""

    mode: str
    norm: str = settings.norm(About(balls.NORMS))
    eps: str | float = settings.eps()
    num_steps: int = settings.count(50, "gradient steps, shared by the phases of a run")
    step_size: str | float = settings.step_size()
    early_stop: bool = settings.early_stop(True)
    driver: str = settings.driver()


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        objective: what it raises.
        rows: rows of the attack -> rows of pgd.Search.
        model: outputs_fn -> the `jax.tree_util.Partial` that is attacked.
        passes: forward passes of a step.
    """

    objective: Objective
    rows: Callable[[dict[str, Any]], dict[str, Any]]
    model: Callable[[Any], jax.tree_util.Partial] = lambda outputs_fn: outputs_fn
    passes: int = 1


def label(config: Settings) -> str:
    """As tables name it: "joint-50"."""
    return f"{config.mode}-{config.num_steps}"


def attack_by(name: str, config: Settings, about: About, begin: Callable, stops: bool) -> build.Attack:
    """Builds `attack(outputs_fn, key, x, y) -> x_adv`.

    Args:
        name, config, about: of the attack.
        begin: inputs -> (inputs, the candidate before the first run, the runs, each a list of phases).
        stops: as in driver.rounds.
    Raises:
        UserError: a setting is out of range.
    """
    config = settings.read(name, config)

    def step_size_of(num_steps):
        return units.step_size(config.step_size, config.eps, num_steps, config.norm, f"step_size of {name}")

    step_size_of(config.num_steps)

    def attack(outputs_fn, key, x, y):
        inputs, worst, runs = begin(build.inputs_of(
            outputs_fn, key, x, y, takes=about.takes, eps=config.eps))

        def one(inputs, number):
            steps, init = max(round(config.num_steps / len(runs[number])), 1), {}
            step_size = jnp.asarray(step_size_of(steps), inputs.rows["x"].dtype)
            for phase in runs[number]:
                program = pgd.Search(config.norm, "uniform", phase.objective, True, config.early_stop,
                                     cost=(phase.passes, 1))
                phase_inputs = driver.Inputs(phase.model(inputs.logits_fn), phase.rows(inputs.rows) | init,
                                             inputs.scalars | dict(restart=number, step_size=step_size))
                candidate = driver.run(program, phase_inputs, steps + 1, config.driver)
                init = {"init": candidate["x"]}
            return candidate

        return jax.lax.stop_gradient(driver.rounds(one, inputs, worst, len(runs), stops)["x"])

    return attack


def needed(name: str, about: About, aux: dict[str, Any]) -> list[Any]:
    """The entries of a model's aux that the attack reads; a UserError names those that the model does not have."""
    if missing := [entry for entry in about.needs if entry not in aux]:
        raise UserError(f"{name} reads {', '.join(missing)}: expected a model that gives {', '.join(about.needs)}")
    return [aux[entry] for entry in about.needs]
