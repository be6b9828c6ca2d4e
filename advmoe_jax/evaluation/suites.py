"""Attacks that are run together, by name.

A suite's robust accuracy is the worst case per example over its attacks.
"""

import dataclasses
import math

from advmoe_jax.attacks import adaptive, gated, parse
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import find
from advmoe_jax.core.errors import UserError, unknown_name

_STANDARD = "apgd(loss=ce) apgd(loss=dlr,targets=9) fab(targets=9) square"
_STANDARD_L1 = "apgd(loss=ce,restarts=5) apgd(loss=dlr,targets=5) fab(targets=9) square"
_FAST = ("apgd(loss=ce,early_stop=True) apgd(loss=dlr,targets=9,early_stop=True) fab(targets=9,early_stop=True) square")
_FAST_L1 = ("apgd(loss=ce,restarts=5,early_stop=True) apgd(loss=dlr,targets=5,early_stop=True) "
            "fab(targets=9,early_stop=True) square")
_MOL = ("pgd(norm=l1,eps={l1},num_steps=20) pgd(norm=l2,eps=1.0,num_steps=20) "
        "pgd(norm=linf,eps=8/255,num_steps=20) {more}")
_NATURAL = "fog snow rotation"
_MOL_ADVERSARIAL = (
    "pgd(norm=l1,eps=16,num_steps=20,l1_share=0.05) gaussian_noise(norm=l1,eps=16) salt_pepper(norm=l1,eps=16) "
    "pgd(norm=l2,eps=1.0,num_steps=20,step_size=0.2) fgsm(norm=l2,eps=1.0) ddn(norm=l2,eps=1.0) "
    "deepfool(norm=l2,eps=1.0,num_steps=100,beyond=project) rays(norm=l2,eps=1.0) "
    "pgd(norm=linf,eps=8/255,num_steps=20,step_size=0.01) fgsm(norm=linf,eps=8/255) "
    "deepfool(norm=linf,eps=8/255,num_steps=100,beyond=project) rays(norm=linf,eps=8/255)")
_THREAT = "apgd(norm={norm},eps={eps},loss=ce) apgd(norm={norm},eps={eps},loss=dlr,targets=3)"
_SRGKP = ("normalized(eps_sd=0.01{std}) normalized(eps_sd=0.1{std}) "
          "normalized(eps_sd=8/255,step_sd=2/255,num_steps=3,labels=true{std})")
_IMAGENET = ",std=0.229 0.224 0.225"
_WORST_CASES = {
    "quick": "fgsm pgd(num_steps=20) apgd(loss=ce) apgd(loss=dlr,targets=3) square(num_queries=500)",
    "standard": _STANDARD, "fast": _FAST,
    "plus": "apgd(loss=ce,restarts=5) apgd(loss=dlr,restarts=5) fab(targets=0,restarts=5) square "
            "apgd(loss=dlr,targets=9) fab(targets=9)",
    "rand": "apgd(loss=ce,eot=20) apgd(loss=dlr,eot=20)"}
_COLUMNS = {
    "adaptive": " ".join(("pgd", *(f"adaptive(mode={mode})" for mode in adaptive.MODES), "square")),
    "union": "pgd(norm=linf,eps=0.03) pgd(norm=l2,eps=0.5) pgd(norm=l1,eps=12)",
    "union-8": " ".join(_THREAT.format(norm=norm, eps=eps) for norm, eps in (
        ("linf", "8/255"), ("l2", "0.5"), ("l1", "12"))),
    "natural": _NATURAL,
    "gated": " ".join(("pgd", *(f"gated(mode={mode})" for mode in gated.MODES), "square")),
    "advmoe": "pgd(norm=linf,eps=8/255,num_steps=50)",
    "advmoe-released": "pgd(norm=linf,eps=8/255,num_steps=10,step_size=2/255)",
    **{f"madry-{steps}": f"pgd(num_steps={steps},step_size=2/255)" for steps in (7, 10, 20)},
    "hydra": "pgd(num_steps=10,step_size=2/255)",
    "harp": "pgd(num_steps=50,step_size=2.5 eps/steps)",
    "cw-linf-harp": "pgd(num_steps=20,step_size=2/255,loss=margin)",
    "cw-linf-dverge": "pgd(num_steps=50,step_size=0.2 eps,loss=margin)",
    "srgkp": _SRGKP.format(std=""),
    "srgkp-imagenet": f"normalized(eps_sd=0.001{_IMAGENET}) {_SRGKP.format(std=_IMAGENET)}",
    "mol-adv": _MOL_ADVERSARIAL, "mol-all": f"{_MOL_ADVERSARIAL} {_NATURAL} fog(overflow=clip)",
    "mol-cifar": _MOL.format(l1=16, more=_NATURAL), "mol-tiny": _MOL.format(l1=12, more=_NATURAL)}
NAMES = (*_WORST_CASES, *_COLUMNS)
"""AutoAttack is "standard", and with less work "fast", "plus" and "rand". Of the first five the attacks get what those
before them left; of the others each gets all images, since its own accuracy is wanted too."""


@dataclasses.dataclass(frozen=True)
class Suite:
    """Attacks, and how they are counted.

    Attributes:
        name: for tables; of a single attack its label.
        specs: in order.
        survivors_only: whether an attack gets only the images that stood the ones before it.
        asked: the fields of `config.eval` that ask for it.
    """

    name: str
    specs: tuple[Spec, ...]
    survivors_only: bool
    asked: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def norm(self) -> str:
        """Of all attacks; "" if they differ or have none."""
        return _common(self.specs, "norm")

    @property
    def eps(self) -> str:
        """Of all attacks as it was written; "" if they differ or have none."""
        return _common(self.specs, "eps")

    @property
    def unions(self) -> dict[str, tuple[Spec, ...]]:
        """{name: attacks} of which the worst case is shown beside that of all: those by PGD, where there are several
        and others too."""
        by_pgd = tuple(spec for spec in self.specs if spec.name == "pgd")
        return {"all PGD": by_pgd} if 1 < len(by_pgd) < len(self.specs) else {}

    @property
    def settings(self) -> dict[str, str]:
        """All settings as text: of an attack by its own name those of its config, else {"0": "pgd(...)", ...}."""
        if self.name == self.specs[0].label:
            return self.specs[0].settings
        return {str(number): spec.text for number, spec in enumerate(self.specs)}


def _common(specs, field):
    values = {str(getattr(spec.config, field, "")) for spec in specs}
    return values.pop() if len(values) == 1 else ""


def together(text: str, norm: str, eps: str | float) -> Suite:
    """A suite whose attacks are counted as one worst case.

    Args:
        text: a name in NAMES; or attacks as parse.attacks reads them; or "NAME: attacks", of which each gets all images
            and its own accuracy is shown.
        norm, eps: of attacks that say none.
    Raises:
        UserError: it is none of these.
    """
    name = text.strip()
    asked = {"suite": name, "norm": norm, "eps": str(eps)}
    if name in NAMES:
        chosen = {"standard": _STANDARD_L1, "fast": _FAST_L1}.get(name) if norm == "l1" else None
        chosen = chosen or _WORST_CASES.get(name) or _COLUMNS[name]
        return Suite(name, parse.attacks(chosen, norm=norm, eps=eps), name in _WORST_CASES, asked)
    own, colon, attacks = map(str.strip, name.partition(":"))
    if colon:
        if not own.replace("-", "").isidentifier() or own in (*NAMES, *find.names("attacks", "make")):
            raise UserError(f"the suite {name!r} has the name {own!r}: expected one of letters and hyphens that is no "
                            "other suite's or attack's, before the colon")
        return Suite(own, parse.attacks(attacks, norm=norm, eps=eps), False, asked)
    if name.replace("-", "").isidentifier() and name not in find.names("attacks", "make"):
        raise unknown_name("suite", name, {*NAMES, *find.names("attacks", "make")})
    specs = parse.attacks(text, norm=norm, eps=eps)
    return Suite("+".join(spec.label for spec in specs), specs, True, asked)


def alone(text: str, norm: str, eps: str | float) -> tuple[Suite, ...]:
    """A suite for each attack of a list. Arguments as `together`."""
    return tuple(Suite(spec.label, (spec,), False, {"suite": "", "attacks": spec.text})
                 for spec in parse.attacks(text, norm=norm, eps=eps))


def check_shape(suite: Suite, shape: tuple[int, ...]) -> None:
    """Raises UserError for a budget that no two images (H, W, C) of that shape use up."""
    size = math.prod(shape)
    for spec in suite.specs:
        for norm, eps in spec.budgets.items():
            if eps > (most := {"linf": 1, "l2": math.sqrt(size), "l1": size}[norm]):
                raise UserError(f"{spec.label} has eps {eps:g} in {norm}, and two images of shape {shape} are at most "
                                f"{most:.4g} apart: expected less, in units of [0, 1]")
