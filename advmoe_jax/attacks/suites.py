"""Attacks that are run together, by name.

A suite's robust accuracy is the worst case per example over its attacks.
"""

import dataclasses

from advmoe_jax.attacks import parse
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import find
from advmoe_jax.core.errors import unknown_name

_STANDARD = {
    "linf": "apgd(loss=ce) apgd(loss=dlr,targets=9) fab(targets=9) square",
    "l1": "apgd(loss=ce,restarts=5) apgd(loss=dlr,targets=5) fab(targets=9) square"}
_PLUS = ("apgd(loss=ce,restarts=5) apgd(loss=dlr,restarts=5) fab(targets=0,restarts=5) square "
         "apgd(loss=dlr,targets=9) fab(targets=9)")
_QUICK = "fgsm pgd(num_steps=20) apgd(loss=ce) apgd(loss=dlr,targets=3) square(num_queries=500)"


@dataclasses.dataclass(frozen=True)
class Suite:
    """Attacks, and how they are counted.

    Attributes:
        name: for tables; of a single attack its label.
        specs: in order.
        survivors_only: whether an attack gets only the images that stood the ones before it.
    """

    name: str
    specs: tuple[Spec, ...]
    survivors_only: bool

    @property
    def norm(self) -> str:
        """Of all attacks; "" if they differ or have none."""
        return _common(self.specs, "norm")

    @property
    def eps(self) -> str:
        """Of all attacks as it was written; "" if they differ or have none."""
        return _common(self.specs, "eps")

    @property
    def settings(self) -> dict[str, str]:
        """All settings as text."""
        if len(self.specs) == 1:
            return self.specs[0].settings
        return {str(number): f"{spec.name} {spec.settings}" for number, spec in enumerate(self.specs)}


def _common(specs, field):
    values = {str(getattr(spec.config, field, "")) for spec in specs}
    return values.pop() if len(values) == 1 else ""


def _early(text: str) -> str:
    """The attacks of a text, leaving images alone once they are broken."""
    return " ".join(f"{item[:-1]},early_stop=True)" if item.endswith(")") else item for item in text.split())


NAMES = ("quick", "standard", "fast", "plus", "rand", "union")


def _text(name: str, norm: str) -> str:
    standard = _STANDARD.get(norm, _STANDARD["linf"])
    return {"quick": _QUICK, "standard": standard, "fast": _early(standard), "plus": _PLUS,
            "rand": "apgd(loss=ce,eot=20) apgd(loss=dlr,eot=20)",
            "union": "pgd(norm=linf,eps=0.03,num_steps=50) pgd(norm=l2,eps=0.5,num_steps=50) "
                     "pgd(norm=l1,eps=12,num_steps=50)"}[name]


def together(text: str, norm: str, eps: str | float) -> Suite:
    """A suite whose attacks are counted as one worst case.

    Args:
        text: a name in NAMES, or attacks as parse.attacks reads them.
        norm, eps: of attacks that say none.
    Raises:
        UserError: it is neither.
    """
    name = text.strip()
    if name in NAMES:
        return Suite(name, parse.attacks(_text(name, norm), norm=norm, eps=eps), True)
    if name.isidentifier() and name not in find.names("attacks", "make"):
        raise unknown_name("suite", name, (*NAMES, *find.names("attacks", "make")))
    specs = parse.attacks(text, norm=norm, eps=eps)
    return Suite("+".join(spec.label for spec in specs), specs, True)


def alone(text: str, norm: str, eps: str | float) -> tuple[Suite, ...]:
    """A suite for each attack of a list. Arguments as `together`."""
    return tuple(Suite(spec.label, (spec,), False) for spec in parse.attacks(text, norm=norm, eps=eps))
