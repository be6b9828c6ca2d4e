"""Counts from shares, in exact arithmetic: in floats (1 - 0.9) * 10 is less than 1."""

import math
from fractions import Fraction

from advmoe_jax.core.errors import UserError


def share(value: str | float | Fraction, what: str = "share") -> Fraction:
    """Reads "9/16", "0.9", 0.9 or a Fraction as the decimal or fraction that a person means.

    Raises:
        UserError: it is no number, or not in [0, 1].
    """
    try:
        result = value if isinstance(value, Fraction) else Fraction(str(value).strip())
    except (ValueError, ZeroDivisionError):
        result = None
    if result is None or not 0 <= result <= 1:
        raise UserError(f"{what} is {value!r}: expected a number from 0 to 1, or a fraction such as '9/16'")
    return result


def kept(count: int, keep: Fraction) -> int:
    """How many of `count` units are kept: count - floor((1 - keep) * count)."""
    return count - math.floor((1 - keep) * count)


def exact(count: int, part: Fraction, what: str) -> int:
    """part * count.

    Raises:
        UserError: it is no whole number.
    """
    result = part * count
    if result.denominator != 1:
        raise UserError(f"{what}: {part} of {count} is {float(result):g}: expected a whole number")
    return int(result)
