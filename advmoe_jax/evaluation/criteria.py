"""Accuracies under several attacks, each by itself, that are measured again and again while a run is trained.

The field `train.criteria` names the attacks. What they find chooses nothing; reports show the best evaluation of each.
"""

import numpy as np

from advmoe_jax.attacks import parse
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation.suites import Suite
from advmoe_jax.evaluation.verdicts import Found


def asked(config) -> Suite | None:
    """The attacks of `config.train.criteria`, those that say no budget with that of training; None if there are none.

    Raises:
        UserError: they cannot be read, or two have one name.
    """
    if not config.train.criteria.strip():
        return None
    try:
        specs = parse.attacks(config.train.criteria, norm=config.attack.norm, eps=config.attack.eps)
    except UserError as error:
        raise UserError(f"train.criteria: {error}") from None
    names = [name(spec) for spec in specs]
    if twice := [of for of in names if names.count(of) > 1]:
        raise UserError(f"train.criteria names {twice[0]} twice: expected attacks that their names and budgets tell "
                        "apart")
    return Suite("criteria", specs, survivors_only=False)


def name(spec: Spec) -> str:
    """As records and tables name it: "fgsm-0.01sd", "pgd-10 linf 1/255"."""
    norm, eps = (str(getattr(spec.config, field, "")) for field in ("norm", "eps"))
    return f"{spec.label} {norm} {eps}" if norm and eps else spec.label


def accuracies(found: Found) -> dict[str, float]:
    """{name: share of all images} that are right when clean, and after the attack through every gradient.

    Of attacks that count so (`About.all_images`), those that are right after it, whatever they were when clean.
    """
    right: dict[str, np.ndarray] = {}
    for attempt in found.own:
        before = np.ones_like(found.correct) if attempt.spec.about.all_images else found.correct
        of = name(attempt.spec)
        right[of] = right.get(of, before) & found.right_after([attempt])
    return {of: float(stands.mean()) for of, stands in right.items()}
