"""Settings that attacks share, and their checks.

norm, eps: the budget; eps is a number or a fraction such as "8/255", in pixel units of [0, 1].
early_stop: whether an image is left alone once it is broken, or once the perturbation that was found is within eps.
    Outside a traced program that saves its share of the work; the verdicts are the same.
beyond: what a search for the smallest perturbation returns where that is larger than eps, see BEYOND.
driver: how the steps are run, see driver.run.
"""

from typing import Any

from advmoe_jax.attacks import driver
from advmoe_jax.attacks.about import About
from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError, one_of

BEYOND = ("clean", "project", "keep")
"""The clean image, the perturbation scaled to eps, or the image that was found, outside the budget, for studies of
distances."""

_RANGES = {
    "0 or more": lambda n: n >= 0, "more than 0": lambda n: n > 0,
    "more than 0 and less than 1": lambda n: 0 < n < 1, "more than 0 and at most 1": lambda n: 0 < n <= 1,
    "0 to 1": lambda n: 0 <= n <= 1, "0 to search, or up to 1": lambda n: 0 <= n <= 1,
    "0 to 180 degrees": lambda n: 0 <= n <= 180}


def read(name: str, config: Any, about: About, **limits: int | str) -> dict[str, float]:
    """Checks the settings of an attack that are listed above, and others.

    Args:
        name: of the attack, for errors.
        config: its settings.
        about: what it is.
        limits: of each other field that is checked: the smallest whole number, or a range of numbers and fractions in
            the words of _RANGES, such as "0 or more".
    Returns:
        {"eps": in pixel units, if there is a budget; field: number, for those with a range}.
    Raises:
        UserError: a setting is out of range.
    """
    if about.norms:
        one_of(f"norm of {name}", config.norm, about.norms)
    if hasattr(config, "driver"):
        one_of("driver", config.driver, driver.DRIVERS)
    if hasattr(config, "beyond"):
        one_of(f"beyond of {name}", config.beyond, BEYOND)
    numbers = {"eps": units.eps(config.eps, config.norm)} if about.norms else {}
    for field, limit in limits.items():
        value, what = getattr(config, field), f"{name}'s {field}"
        if isinstance(limit, int):
            units.whole(value, limit, what)
            continue
        numbers[field] = units.number(value, what)
        if not _RANGES[limit](numbers[field]):
            raise UserError(f"{name} has {field}={value}: expected {limit}")
    return numbers
