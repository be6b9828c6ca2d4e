"""Fields of a config: what a dataclass says of each beside its default, and the check of a value.

Who reads a setting owns it: a module has a frozen dataclass `Config` beside its `make`, whose fields are `setting`s.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from advmoe_jax.core.errors import UserError, one_of, shown

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True)
class Only:
    """When a field has an effect. Where it has none, only its default is accepted.

    Attributes:
        when: in words, "model.num_experts of 2 or more".
        holds: of the whole config.
    """

    when: str
    holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field of a config.

    Attributes:
        default: its type is the field's: bool, int, float or str.
        what: one line for people.
        choices: all values that it may have; () for any.
        least, most: range of a number, both included.
        above: what a number must be greater than.
        read: raises UserError for a value that cannot be read; called with the value and the field's name.
        room: (package, what its modules define, ...) of a field that names a module; fields of that module's `Config`
            belong to the same group.
        only: when it has an effect; None: always.
    """

    default: Any
    what: str
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    read: Callable[[Any, str], Any] | None = None
    room: tuple[str, ...] = ()
    only: Only | None = None

    @property
    def expected(self) -> str:
        """What values it takes, in words."""
        if self.choices:
            return " | ".join(self.choices)
        low, high = (_number(bound) for bound in (self.least, self.most))
        bounds = (f"above {_number(self.above)}" if self.above > -math.inf else "",
                  f"{low} or more" if self.least > -math.inf and self.most == math.inf else "",
                  f"{low} to {high}" if self.most < math.inf and self.least > -math.inf else "",
                  f"at most {high}" if self.most < math.inf and self.least == -math.inf else "")
        return " and ".join(filter(None, bounds)) or WORDS[type(self.default)]

    def check(self, name: str, value: Any) -> None:
        """Raises UserError for a value of another type or out of range."""
        kind = type(self.default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number if kind is float else type(value) is kind):
            raise UserError(f"{name} is {shown(value)}: expected {WORDS[kind]}")
        if kind is str and not value.isprintable():
            raise UserError(f"{name} is {shown(value)}: expected text without line breaks or control characters")
        if kind is float and not math.isfinite(value):
            raise UserError(f"{name} is {value!r}: expected a finite number")
        if self.choices:
            one_of(name, value, self.choices)
        if kind in (int, float) and not (self.least <= value <= self.most and value > self.above):
            raise UserError(f"{name} is {value}: expected {self.expected}")
        if self.read is not None:
            self.read(value, name)


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def setting(default: Any, what: str, **more: Any) -> Any:
    """A dataclass field with what `Setting` says of it."""
    return dataclasses.field(default=default, metadata={"setting": Setting(default, what, **more)})


def group(default: Any, only: Only) -> Any:
    """A dataclass field that holds a dataclass of settings, which have an effect in one case."""
    return dataclasses.field(default=default, metadata={"only": only})


def settings(config_class: type | Any, prefix: str = "") -> dict[str, Setting]:
    """{"model.width": Setting} of a dataclass of settings, or of an instance, whose values are then the defaults.

    A field that holds a dataclass instance is a group below: {"optim.router.momentum": ...}.
    """
    return dict(_of_class(config_class, prefix) if isinstance(config_class, type) else _settings(config_class, prefix))


def _settings(config_class, prefix):
    table = {}
    for field in dataclasses.fields(config_class):
        name = f"{prefix}{field.name}"
        value = getattr(config_class, field.name, field.default)
        if dataclasses.is_dataclass(value):
            below, only = settings(value, f"{name}."), field.metadata.get("only")
            table |= {k: dataclasses.replace(of, only=of.only or only) for k, of in below.items()}
        else:
            if "setting" not in field.metadata:
                owner = config_class if isinstance(config_class, type) else type(config_class)
                raise UserError(f"{owner.__module__}: field {field.name} of {owner.__name__} is no setting: expected "
                                "core.fields.setting(default, what)")
            table[name] = dataclasses.replace(field.metadata["setting"], default=value)
    return table


_of_class = functools.cache(_settings)  # a config asks for those of the same classes hundreds of times


def check_effects(table: Mapping[str, Setting], values: Mapping[str, Any], config: Any) -> None:
    """Raises UserError for a field that is not at its default and would have no effect."""
    for name, of in table.items():
        if of.only is not None and values[name] != of.default and not of.only.holds(config):
            raise UserError(f"{name} is {values[name]!r}, which has no effect here: it is for {of.only.when}; "
                            f"expected {of.default!r}")
