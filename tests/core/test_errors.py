"""Exit codes, and the one line that names the nearest name."""

import pytest

from advmoe_jax.core import errors


@pytest.mark.parametrize("kind, code", [
    (errors.UserError, 2), (errors.UnreliableError, 3), (errors.NonFiniteError, 4), (errors.NoSpace, 74),
    (errors.Preempted, 75)])
def test_exit_codes(kind, code):
    assert kind("x").exit_code == code and isinstance(kind("x"), errors.UserError)


def test_unknown_name():
    known = iter(["pgd", "apgd", "square"])
    assert str(errors.unknown_name("attack", "pdg", known)) == (
        "unknown attack 'pdg': expected one of apgd, pgd, square; did you mean 'pgd'?")
    assert str(errors.unknown_name("attack", "zzz", ["pgd"])) == "unknown attack 'zzz': expected one of pgd"
    assert str(errors.unknown_name("model.depth", 19, ["18", "50"])) == (
        "unknown model.depth 19: expected one of 18, 50; did you mean '18'?")


def test_one_of():
    assert errors.one_of("norm", "l2", iter(("linf", "l2"))) == "l2"
    with pytest.raises(errors.UserError, match="unknown norm 'l3': expected one of l2, linf; did you mean 'l2'?"):
        errors.one_of("norm", "l3", iter(("linf", "l2")))
