"""Checks that the settings of every attack share."""

from typing import Any

from advmoe_jax.attacks import driver
from advmoe_jax.core import units
from advmoe_jax.core.errors import one_of

BEYOND = ("clean", "project", "keep")
"""What a search for the smallest perturbation returns where that is larger than eps: the clean image, the perturbation
scaled to eps, or the image that was found, outside the budget, for studies of distances."""


def check(name: str, config: Any, **least: int) -> None:
    """Checks driver, `beyond` if there is one, and whole numbers of a Config; arguments and errors as `budget`."""
    one_of("driver", config.driver, driver.DRIVERS)
    if hasattr(config, "beyond"):
        one_of(f"beyond of {name}", config.beyond, BEYOND)
    for field, smallest in least.items():
        units.whole(getattr(config, field), smallest, f"{name}'s {field}")


def budget(name: str, config: Any, norms: tuple[str, ...], **least: int) -> float:
    """Checks norm and eps of a Config, and what `check` does.

    Args:
        name: of the attack, for errors.
        config: its settings.
        norms: that it knows.
        least: the smallest value of each field that holds a whole number.
    Returns:
        eps in pixel units of [0, 1].
    Raises:
        UserError: a setting is out of range.
    """
    one_of(f"norm of {name}", config.norm, norms)
    check(name, config, **least)
    return units.eps(config.eps, config.norm)
