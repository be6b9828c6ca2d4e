"""Numbers as people write them: eps as "8/255", lengths in steps, epochs or percent."""

import math
import re
from fractions import Fraction

from advmoe_jax.core.errors import UserError

MOST_STEPS = 2**31 - 1  # they are counted in int32
_MOST_EPS = 1e6  # above the l1 norm of any image


def number(value: str | float, what: str = "value") -> float:
    """Reads `"8/255"`, `"0.5/255"`, `"0.1"`, `0.1` or `1` as a float.

    Raises:
        UserError: it is none of these, or not finite.
    """
    try:
        if isinstance(value, str) and re.search(r"e[+-]?\d{4}", value, re.IGNORECASE):  # too long a Fraction
            raise ValueError
        result = float(_fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UserError(f"{what} is {value!r}: expected a number or a fraction, such as '8/255'") from None
    if not math.isfinite(result):
        raise UserError(f"{what} is {value!r}: expected a finite number")
    return result


def _fraction(text: str) -> Fraction:
    parts = text.strip().split("/")
    if len(parts) != 2 or any(part != part.strip() for part in parts):
        return Fraction(text.strip())
    return Fraction(parts[0]) / Fraction(parts[1])


def as_fraction(text: str) -> str:
    """A number as people write budgets: "8/255" as it is, "1/10" of "0.1"; what is no number as it is."""
    try:
        return text if "/" in text else str(Fraction(text))
    except ValueError:
        return text


def eps(value: str | float, norm: str, what: str = "eps") -> float:
    """Reads an attack budget in pixel units of [0, 1].

    Raises:
        UserError: negative, absurd, or above 1 for linf (which is a budget in 0-255 units).
    """
    result = number(value, what)
    if not 0 <= result <= _MOST_EPS:
        raise UserError(f"{what} is {value!r}: expected {'0 or more' if result < 0 else f'at most {_MOST_EPS:g}'}")
    if norm == "linf" and result > 1:
        raise UserError(
            f"{what} is {value!r} for linf, but images are in [0, 1]: write '{result:g}/255' for {result:g} grey levels"
        )
    return result


_LENGTHS = {"steps": "steps", "step": "steps", "epochs": "epochs", "epoch": "epochs", "%": "%", "": "epochs"}


def length(amount: str | int | float, what: str = "length") -> tuple[float, str]:
    """Reads "300 steps", "12 epochs", "5%", or a bare number of epochs, as a number and "steps", "epochs" or "%".

    Raises:
        UserError: it is none of these, negative, above 100 %, or more than the steps that can be counted.
    """
    text = str(amount).strip()
    ending = next(ending for ending in _LENGTHS if text.endswith(ending))
    try:
        value = float(text.removesuffix(ending))
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise UserError(f"{what} is {amount!r}: expected for example '300 steps', '12 epochs' or '5%'")
    if value > (100 if _LENGTHS[ending] == "%" else MOST_STEPS):
        raise UserError(f"{what} is {amount!r}: expected at most {MOST_STEPS} steps or epochs, or 100%")
    return value, _LENGTHS[ending]


def steps(amount: str | int | float, steps_per_epoch: int, total_steps: int = 0, what: str = "length") -> int:
    """Reads a length as training steps.

    Args:
        amount: as `length` reads it.
        steps_per_epoch: iterations in one pass over the training images.
        total_steps: what percentages refer to.
        what: the name that an error gives it.
    Returns:
        A number of steps, at least 0, rounded to the nearest.
    """
    value, unit = length(amount, what)
    found = round(value * {"steps": 1, "epochs": steps_per_epoch, "%": total_steps / 100}[unit])
    if found > MOST_STEPS:
        raise UserError(f"{what} is {amount!r}, {found} steps: expected at most {MOST_STEPS}")
    return found


def whole(value: int, least: int, what: str) -> int:
    """Returns `value`.

    Raises:
        UserError: it is no whole number, or less than `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{what} is {value!r}: expected a whole number, {least} or more")
    return value


def step_size(value: str | float, eps_value: float, num_steps: int, norm: str, what: str = "step_size") -> float:
    """Reads an attack's step size in pixel units of [0, 1].

    Args:
        value: a number, a fraction, "0.625 eps" or "2.5 eps/steps".
        eps_value: the budget that "eps" stands for.
        num_steps: what "steps" stands for.
        norm: of the attack.
    Raises:
        UserError: it cannot be read, is negative, or above 1 for linf (which is a step in 0-255 units).
    """
    text, scale = re.sub(r"\s*/\s*", "/", str(value).strip()), 1.0
    for suffix, factor in (("eps/steps", eps_value / max(num_steps, 1)), ("eps", eps_value)):
        if text.endswith(suffix):
            text, scale = text.removesuffix(suffix), factor
            break
    try:
        result = number(text, what) * scale
    except UserError:
        raise UserError(f"{what} is {value!r}: expected a number, or for example '2/255', '0.625 eps' or "
                        "'2.5 eps/steps'") from None
    if result < 0:
        raise UserError(f"{what} is {value!r}: expected 0 or more")
    if norm == "linf" and result > 1 and scale == 1:
        raise UserError(f"{what} is {value!r} for linf, but images are in [0, 1]: write '{result:g}/255' for "
                        f"{result:g} grey levels")
    return result
