"""Settings that attacks share, and the check of all that an attack has."""

import dataclasses
import warnings
from typing import Any, TypeVar

from advmoe_jax.attacks import driver as drivers
from advmoe_jax.attacks.about import About
from advmoe_jax.attacks.objectives import NAMED, Objective
from advmoe_jax.core import fields, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting

BEYOND = ("clean", "project", "keep")
"""The clean image, the perturbation scaled to eps, or the image that was found, outside the budget, for studies of
distances."""
_MOST = 10**6  # of what is counted
_LINF_EPS = [n / 255 for n in range(1, 17)]
_Config = TypeVar("_Config")


def norm(about: About, default: str = "") -> Any:
    """The norm of the perturbation: the first of the attack's unless given."""
    return setting(default or about.norms[0], "norm of the perturbation", choices=about.norms)


def eps(default: str | float = "8/255") -> Any:
    """The budget."""
    return setting(str(default), "budget, a number or a fraction such as 8/255, in pixel units of [0, 1]")


def count(default: int, what: str, least: int = 1, most: int = _MOST) -> Any:
    """A whole number."""
    return setting(default, what, least=least, most=most)


def step_size() -> Any:
    """The size of gradient steps, as `units.step_size` reads it."""
    return setting("2.5 eps/steps", "of gradient steps: a number, a fraction, 0.625 eps or 2.5 eps/steps")


def loss(*names: str) -> Any:
    """What is raised, one of NAMED."""
    return setting("ce", "what is raised; in Python also an objectives.Objective", choices=names or tuple(NAMED))


def early_stop(default: bool = False) -> Any:
    """Whether the attack is over once it has won."""
    return setting(default, "whether an image is left alone once it is broken, or once what was found is within eps; "
                            "outside a traced program that saves work, and the verdicts are the same")


def beyond() -> Any:
    """What a search returns that finds nothing within eps."""
    return setting("clean", "what a search for the smallest perturbation returns where that is larger than eps: the "
                            "clean image, the perturbation scaled to eps, or the image that was found", choices=BEYOND)


def check_channels(attack: str, name: str, text: str | float, channels: int) -> None:
    """Raises UserError if a setting that has one number for all channels, or one for each, is for other images."""
    count = len(str(text).split())
    if count not in (1, channels):
        raise UserError(f"{attack} has {count} numbers in {name} and images {channels} channels: expected as many, or "
                        "one")


def driver() -> Any:
    """How steps are run."""
    return setting("auto", "how the steps are run, see driver.run", choices=drivers.DRIVERS)


def read(name: str, config: _Config) -> _Config:
    """Checks all settings of an attack.

    Args:
        name: of the attack, for errors.
        config: its settings. What is a number may be text, "1/10".
    Returns:
        The settings with eps, and every number that has a fraction, as floats.
    Warns:
        An eps of so many grey levels, as for linf, in another norm.
    Raises:
        UserError: a setting is out of its range.
    """
    numbers = {}
    for field, of in fields.settings(type(config)).items():
        value, what = getattr(config, field), f"{field} of {name}"
        if isinstance(of.default, float):
            value = numbers[field] = units.number(value, what)
        elif isinstance(of.default, str) and not isinstance(value, Objective):
            value = str(value)
        if not isinstance(value, Objective):
            of.check(what, value)
    if hasattr(config, "norm"):
        numbers["eps"] = units.eps(config.eps, config.norm, f"eps of {name}")
        if config.norm != "linf" and numbers["eps"] in _LINF_EPS:
            warnings.warn(f"eps of {name} is {config.eps} for {config.norm}, as budgets of linf are: expected for "
                          "example 0.5 for l2 or 12 for l1", stacklevel=3)
    return dataclasses.replace(config, **numbers)
