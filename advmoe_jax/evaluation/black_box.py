"""A second look at what gradient attacks leave: a cheap attack on some of it that sees no gradient of the model.

A model whose gradients lead nowhere stands every attack that follows them. So each budget at which only gradients were
followed is tried by some hundred queries of Square, and a routed model also by PGD on its smooth mixture of experts.
Images that fall count as broken, and many of them say that the rest is not to be trusted. m images.
"""

from collections.abc import Collection, Sequence

from advmoe_jax.attacks import parse
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.evaluation.flag import Flag
from advmoe_jax.evaluation.verdicts import Found

_QUERIES = 300
_STEPS = 20  # of PGD, over the temperatures of the mixture
_MOST_WON = 0.1  # of the images that were tried; one may be a tie


def _follows_gradients(spec: Spec) -> bool:
    return spec.about.takes != "values"


def checks(specs: Sequence[Spec], surfaces: Collection[str] = ()) -> tuple[Spec, ...]:
    """The attacks that are added to a suite: for each budget at which it only follows gradients.

    The settings are fixed and the images come in order, so that a stronger suite is never left with more robust images.

    Args:
        specs: the suite.
        surfaces: names of other functions of the model, see Model.surfaces.
    """
    asked = {budget for spec in specs if hasattr(spec.config, "num_queries") for budget in spec.budgets.items()}
    budgets = dict.fromkeys(budget for spec in specs if _follows_gradients(spec) for budget in spec.budgets.items())
    found = []
    for norm, eps in budgets:
        if eps and (norm, eps) not in asked:
            found.append(parse.attack("square", norm=norm, eps=eps, num_queries=_QUERIES, early_stop=False))
            if "routed" in surfaces and not any(spec.about.takes == "routed" for spec in specs):
                found.append(parse.attack("adaptive", mode="soft", norm=norm, eps=eps, num_steps=_STEPS))
    return tuple(found)


def flags(found: Found) -> tuple[Flag, ...]:
    """What the second look says of the first; or that there was none, and nothing else that sees no gradient."""
    added = [attempt for attempt in found.attempts if attempt.is_check]
    if not added:
        if not any(_follows_gradients(attempt.spec) and attempt.attacked.any() for attempt in found.own) or any(
                hasattr(attempt.spec.config, "num_queries") for attempt in found.own):
            return ()
        return (Flag("not_checked", "no attack without gradients was tried (eval.black_box=false, or no budget to try "
                                    "one at): a model that hides its gradients would seem robust", unreliable=False),)
    left = found.survivors(found.own)
    tried, won = left & (sum(a.attacked for a in added) > 0), left & ~found.survivors(added)
    if not won.any():
        return ()
    share, most = won.sum() / tried.sum(), max(1, _MOST_WON * tried.sum())
    names = " and ".join(dict.fromkeys(attempt.spec.label for attempt in added))
    return (Flag("black_box_wins", f"without the model's own gradients {names} broke {won.sum()} of {tried.sum()} "
                                   f"images that the other attacks had left: expected at most {_MOST_WON:.0%}; they "
                                   f"count as broken, and at that rate RA is {left.mean() * (1 - share):.1%}: attack "
                                   "with suite=standard", unreliable=bool(won.sum() > most)),)
