"""Attacks as text: "fgsm pgd(num_steps=20,norm=l2,eps=0.5)"."""

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from advmoe_jax.attacks import objectives
from advmoe_jax.attacks.about import About
from advmoe_jax.core import fields, find, rng, units
from advmoe_jax.core.errors import UserError, one_of, unknown_name
from advmoe_jax.ops import balls

_ITEM = re.compile(r"\s*(?P<name>\w+)(\((?P<options>[^()]*)\))?(\s|$)")


@dataclasses.dataclass(frozen=True)
class Spec:
    """An attack ready to run.

    Attributes:
        name: of its module.
        config: its settings.
        run: attack(logits_fn, key, x, y) -> x_adv.
        label: as tables name it: "pgd-50", "apgd-t".
        about: what it is, whatever its settings.
        unbounded: whether its strength is fixed by a setting, so that it keeps to no budget.
    """

    name: str
    config: Any
    run: Callable[..., jax.Array]
    label: str
    about: About = About()
    unbounded: bool = False

    @property
    def budgets(self) -> dict[str, float]:
        """{norm: eps}, of which an adversarial image keeps at least one; empty if there are none."""
        if self.unbounded:
            return {}
        names = {norm: f"eps_{norm}" for norm in balls.NORMS if hasattr(self.config, f"eps_{norm}")}
        if norm := getattr(self.config, "norm", ""):
            names = {norm: "eps"}
        return {norm: units.eps(getattr(self.config, name), norm) for norm, name in names.items()}

    @property
    def settings(self) -> dict[str, str]:
        """All settings as text."""
        return {name: str(value) for name, value in sorted(vars(self.config).items())}

    @property
    def text(self) -> str:
        """What `attacks` reads as the same: "pgd(driver=auto,...)"."""
        return f"{self.name}({','.join(f'{key}={value}' for key, value in self.settings.items())})"

    def function(self, outputs_fn: Callable) -> Callable:
        """What it attacks of a single network: x -> (logits, aux) as it is, or x -> logits."""
        return outputs_fn if self.about.takes == "outputs" else objectives.logits_fn(outputs_fn)

    def in_parts(self, function: Callable, key: jax.Array, x: np.ndarray, y: np.ndarray, size: int = 128) -> np.ndarray:
        """The attacked images of as many as a host holds, so many at a time; the key of an image is of its place."""
        keys = rng.per_example(key, np.arange(len(x)))
        parts = [slice(start, start + size) for start in range(0, len(x), size)]
        return np.concatenate([np.asarray(self.run(function, keys[part], x[part], y[part])) for part in parts])


def attack(name: str, defaults: Mapping[str, Any] = MappingProxyType({}), **settings: Any) -> Spec:
    """Builds one attack by the name of its module.

    Args:
        name: of the module.
        defaults: settings for the fields of its Config that `settings` leaves out; those without a field are dropped.
        settings: of its Config.
    Raises:
        UserError: no such attack, no such setting, a value out of range, or a module that does not say what it is.
    """
    module = find.module("attacks", name, defines="make")
    about = getattr(module, "ABOUT", None)
    if not isinstance(about, About):
        raise UserError(f"attack {name} does not say what it is: expected ABOUT = About(...) in {name}.py")
    known = fields.settings(module.Config)
    for setting, value in settings.items():
        if setting not in known:
            raise unknown_name(f"setting of {name}", setting, known)
        if isinstance(known[setting].default, bool):
            settings[setting] = one_of(f"{setting} of {name}", str(value).lower(), ("true", "false")) == "true"
    if settings.get(about.fixed_by):
        defaults = {}
    config = module.Config(**{k: v for k, v in defaults.items() if k in known} | settings)
    run = module.make(config)
    unbounded = bool(about.fixed_by and units.number(getattr(config, about.fixed_by)))
    return Spec(name, config, run, module.label(config), about, unbounded)


def attacks(text: str, **defaults: Any) -> tuple[Spec, ...]:
    """Builds the attacks that a line of text names.

    Args:
        text: names separated by spaces, each with optional settings in parentheses.
        defaults: settings of all of them, unless given in the text.
    """
    specs, position = [], 0
    text = text.strip()
    while position < len(text):
        match = _ITEM.match(text, position)
        if not match:
            raise UserError(f"attacks {text!r} cannot be read at {text[position:]!r}: "
                            "expected for example 'fgsm pgd(num_steps=20,eps=4/255)'")
        given = {}
        for option in filter(None, (match["options"] or "").split(",")):
            key, equals, value = option.partition("=")
            if not equals:
                raise UserError(f"setting {option!r} of {match['name']} has no value: expected name=value")
            given[key.strip()] = _value(value.strip())
        other_norm = given.get("norm", defaults.get("norm")) != defaults.get("norm")
        if other_norm and "norm" in defaults and "eps" in defaults and "eps" not in given:
            raise UserError(f"{match['name']} has norm={given['norm']} and no eps: expected one in that norm, since "
                            f"{defaults['eps']} is for {defaults['norm']}")
        specs.append(attack(match["name"], defaults, **given))
        position = match.end()
    if not specs:
        raise UserError("no attack is named: expected for example 'pgd'")
    return tuple(specs)


def on_one_network(text: str, what: str, such_as: str, **defaults: Any) -> Spec:
    """The one attack on a single network that a line of text names.

    Args:
        text, defaults: as of `attacks`.
        what: the text's name in an error, "--attack".
        such_as: an example for it.
    Raises:
        UserError: it names several, or one on a model of several networks.
    """
    specs = attacks(text, **defaults)
    if len(specs) != 1 or not specs[0].about.on_one_network:
        raise UserError(f"{what} is {text!r}: expected one attack on a single network, such as {such_as!r}")
    return specs[0]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
