"""Fields of a config: what a value may be, what stands below a group, and what has no effect."""

import dataclasses
import types

import pytest

from advmoe_jax.core import fields
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, Setting, group, setting

WET = Only("a wet road", lambda config: config.is_wet)


def _even(value, name):
    if value % 2:
        raise UserError(f"{name} is {value}: expected an even number")


@dataclasses.dataclass(frozen=True)
class Wheel:
    spokes: int = setting(32, "of wire", least=8, most=64, read=_even)
    rim: str = setting("alloy", "what it is made of", choices=("alloy", "steel"))


@dataclasses.dataclass(frozen=True)
class Bicycle:
    weight: float = setting(9.5, "in kilograms", above=0, most=40)
    bell: bool = setting(False, "whether it rings")
    name: str = setting("", "of the owner")
    guard: str = setting("none", "against mud", only=WET)
    front: Wheel = group(Wheel(), Only("bicycles", lambda config: True))
    spare: Wheel = group(Wheel(spokes=16), WET)


TABLE = fields.settings(Bicycle, "bike.")


def test_groups_are_below_with_their_own_defaults():
    assert {name: of.default for name, of in TABLE.items()} == {
        "bike.weight": 9.5, "bike.bell": False, "bike.name": "", "bike.guard": "none", "bike.front.spokes": 32,
        "bike.front.rim": "alloy", "bike.spare.spokes": 16, "bike.spare.rim": "alloy"}
    assert TABLE["bike.weight"].what == "in kilograms" and TABLE["bike.spare.rim"].choices == ("alloy", "steel")
    assert TABLE["bike.spare.rim"].only is WET and TABLE["bike.bell"].only is None


def test_a_value_of_an_instance_is_the_default():
    """A module that overrides a default of what it inherits would else keep the old one."""
    assert fields.settings(Bicycle(weight=7.0, front=Wheel(rim="steel")))["weight"].default == 7.0
    assert fields.settings(Bicycle(front=Wheel(rim="steel")))["front.rim"].default == "steel"

    @dataclasses.dataclass(frozen=True)
    class Tandem(Bicycle):
        weight: float = setting(18.0, "of both", above=0)
        seats: int = setting(2, "in a row")

    table = fields.settings(Tandem)
    assert table["weight"].default == 18 and table["weight"].what == "of both"
    assert table["seats"].default == 2 and table["spare.spokes"].default == 16


@pytest.mark.parametrize("name, values", [
    ("weight", (0.1, 1, 40)), ("bell", (True, False)), ("name", ("", "x")), ("front.spokes", (8, 64)),
    ("front.rim", ("steel",))])
def test_values_that_are_taken(name, values):
    for value in values:
        TABLE[f"bike.{name}"].check(name, value)


@pytest.mark.parametrize("name, value, message", [
    ("weight", "9", "weight is '9': expected a number"), ("weight", True, "weight is True: expected a number"),
    ("weight", None, "weight is None: expected a number"),
    ("weight", 0, "weight is 0: expected above 0 and at most 40"), ("weight", 40.5, "weight is 40.5: expected above 0"),
    ("weight", float("nan"), "weight is nan: expected a finite number"),
    ("weight", float("inf"), "weight is inf: expected a finite number"),
    ("bell", 1, "bell is 1: expected true or false"), ("bell", "true", "bell is 'true': expected true or false"),
    ("name", 3, "name is 3: expected text"),
    ("front.spokes", 32.0, "front.spokes is 32.0: expected a whole number"),
    ("front.spokes", True, "front.spokes is True: expected a whole number"),
    ("front.spokes", 7, "front.spokes is 7: expected 8 to 64"),
    ("front.spokes", 65, "front.spokes is 65: expected 8 to 64"),
    ("front.spokes", 33, "front.spokes is 33: expected an even number"),
    ("front.rim", "steal", "unknown front.rim 'steal': expected one of alloy, steel; did you mean 'steel'?")])
def test_values_that_are_refused(name, value, message):
    with pytest.raises(UserError) as caught:
        TABLE[f"bike.{name}"].check(name, value)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("of, words", [
    (Setting(0, "x"), "a whole number"), (Setting(0.0, "x"), "a number"), (Setting(False, "x"), "true or false"),
    (Setting("", "x"), "text"), (Setting("a", "x", choices=("a", "b")), "a | b"),
    (Setting(1, "x", least=0), "0 or more"), (Setting(1, "x", least=0, most=9), "0 to 9"),
    (Setting(1.0, "x", most=0.5), "at most 0.5"),
    (Setting(1.0, "x", above=0), "above 0"), (Setting(1.0, "x", above=0, most=1), "above 0 and at most 1")])
def test_what_is_expected_in_words(of, words):
    assert of.expected == words


def test_fields_without_effect():
    values = {name: of.default for name, of in TABLE.items()}
    dry, wet = types.SimpleNamespace(is_wet=False), types.SimpleNamespace(is_wet=True)
    fields.check_effects(TABLE, values, dry)
    fields.check_effects(TABLE, values | {"bike.front.spokes": 20, "bike.bell": True}, dry)
    for name, value in (("bike.guard", "steel"), ("bike.spare.spokes", 20)):
        fields.check_effects(TABLE, values | {name: value}, wet)
        with pytest.raises(UserError) as caught:
            fields.check_effects(TABLE, values | {name: value}, dry)
        assert str(caught.value) == (f"{name} is {value!r}, which has no effect here: it is for a wet road; expected "
                                     f"{TABLE[name].default!r}")


def test_a_field_that_is_no_setting_is_named():
    @dataclasses.dataclass(frozen=True)
    class Plain:
        wheels: int = 3

    with pytest.raises(UserError, match="test_fields: field wheels of Plain is no setting: expected core.fields.setti"):
        fields.settings(Plain)
