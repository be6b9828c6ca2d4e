"""Numbers as people write them."""

import math

import pytest

from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError


def _refused(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text, value", [
    ("8/255", 8 / 255), (" 8/255 ", 8 / 255), ("0.5/255", 0.5 / 255), ("0.1", 0.1), (0.1, 0.1), (1, 1.0),
    ("1e-3", 1e-3), ("-2", -2.0)])
def test_number(text, value):
    found = units.number(text)
    assert found == value and isinstance(found, float)


@pytest.mark.parametrize("text", ["", "eight", "8/0", "8 / 255", "1/2/3", None, "nan", [1], "1e999", "1e999999999",
                                  "1e-999999999/3"])
def test_what_is_no_number(text):
    assert _refused(units.number, text, "attack.eps") == (
        f"attack.eps is {text!r}: expected a number or a fraction, such as '8/255'")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite(value):
    assert _refused(units.number, value) == f"value is {value!r}: expected a finite number"


@pytest.mark.parametrize("text, norm, value", [
    ("8/255", "linf", 8 / 255), (1, "linf", 1.0), (0, "l2", 0.0), (12, "l1", 12.0), ("0.5", "l2", 0.5)])
def test_eps(text, norm, value):
    assert units.eps(text, norm) == value


def test_eps_that_is_refused():
    assert _refused(units.eps, -1, "l2") == "eps is -1: expected 0 or more"
    assert _refused(units.eps, "1e30", "l2") == "eps is '1e30': expected at most 1e+06"
    assert _refused(units.eps, "8", "linf", "attack.eps") == (
        "attack.eps is '8' for linf, but images are in [0, 1]: write '8/255' for 8 grey levels")


@pytest.mark.parametrize("text, value", [
    ("300 steps", (300, "steps")), ("1 step", (1, "steps")), ("12 epochs", (12, "epochs")), ("1 epoch", (1, "epochs")),
    ("5%", (5, "%")), ("5 %", (5, "%")), ("12", (12, "epochs")), (12, (12, "epochs")), (0.5, (0.5, "epochs")),
    (" 2.5epochs", (2.5, "epochs")), ("0%", (0, "%"))])
def test_length(text, value):
    assert units.length(text) == value


@pytest.mark.parametrize("text", ["", "steps", "many epochs", "-1 epochs", "inf", "nan%", "5 hours", None])
def test_what_is_no_length(text):
    for call in (units.length, lambda *given: units.steps(given[0], 10, 100, given[1])):
        assert _refused(call, text, "train.length") == (
            f"train.length is {text!r}: expected for example '300 steps', '12 epochs' or '5%'")


@pytest.mark.parametrize("text, value", [
    ("300 steps", 300), ("2 epochs", 78), (0.5, 20), ("5%", 5), ("0.4%", 0), ("100%", 100), (0, 0)])
def test_steps(text, value):
    found = units.steps(text, steps_per_epoch=39, total_steps=100)
    assert found == value and isinstance(found, int)


@pytest.mark.parametrize("text", ["999999999999 epochs", "1e300 steps", "2147483648 steps", "100000000 epochs", "200%"])
def test_more_steps_than_can_be_counted_or_than_there_are(text):
    assert "expected at most" in _refused(units.steps, text, 39, 100)


def test_whole():
    assert units.whole(3, 1, "n") == 3 and units.whole(0, 0, "n") == 0
    for value in (0, True, 2.0, "2", None):
        assert _refused(units.whole, value, 1, "n") == f"n is {value!r}: expected a whole number, 1 or more"


@pytest.mark.parametrize("text, norm, value", [
    ("2/255", "linf", 2 / 255), (0.1, "l2", 0.1), ("0.625 eps", "linf", 0.625 * 0.5), ("eps/steps", "l2", None),
    ("2.5 eps/steps", "linf", 2.5 * 0.05), ("1/4 eps", "linf", 0.125), ("40 eps/steps", "linf", 2.0), (3, "l1", 3.0)])
def test_step_size(text, norm, value):
    if value is None:
        assert "expected a number" in _refused(units.step_size, text, 0.5, 10, norm)
    else:
        assert units.step_size(text, 0.5, 10, norm) == value


def test_step_size_without_steps():
    assert units.step_size("1 eps/steps", 0.5, 0, "l2") == 0.5


def test_step_size_that_is_refused():
    assert _refused(units.step_size, "-1 eps", 0.5, 10, "l2") == "step_size is '-1 eps': expected 0 or more"
    assert _refused(units.step_size, 2, 0.5, 10, "linf", "attack.step_size") == (
        "attack.step_size is 2 for linf, but images are in [0, 1]: write '2/255' for 2 grey levels")
    assert "expected a number" in _refused(units.step_size, "x eps", 0.5, 10, "l2")
