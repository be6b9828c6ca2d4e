"""What an evaluation is asked for, and what of it is left to do."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.evaluation import results, suites
from advmoe_jax.evaluation.suites import Suite
from advmoe_jax.ops import balls


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.eval`. None of them makes another experiment."""

    attacks: str = setting("pgd", "attacks, each alone, with settings: 'fgsm pgd(num_steps=20,norm=l2,eps=0.5)'")
    suite: str = setting("", "in their place a suite by name, or attacks that count as one worst case; or several "
                            "with semicolons between them: 'quick; standard'")
    norm: str = setting("", "norm of attacks that say none; empty: that of attack.norm", choices=("", *balls.NORMS))
    eps: str = setting("", "their eps, or several: '2/255,4/255'; empty: attack.eps")
    n: int = setting(0, "test images, the first so many; 0 for all", least=0, most=10**9)
    black_box: bool = setting(True, "attack some of what gradient attacks leave without gradients; false: not checked")
    batch_size: int = setting(250, "images at a time, at most", least=1, most=10**6)
    seed: int = setting(0, "of the attacks", least=0, most=2**32 - 1)


def check(config) -> None:
    """Raises UserError for attacks that cannot be read, or budgets that do not fit their norm."""
    asked(config)


def asked(config) -> tuple[Suite, ...]:
    """What `config.eval` asks for, the rest being as in training."""
    own, threat = config.eval, config.attack
    if own.norm not in ("", threat.norm) and not own.eps:
        raise UserError(f"eval.norm is {own.norm} and eval.eps is not set: expected an eps in that norm, since "
                        f"attack.eps is for {threat.norm}")
    norm, chosen = own.norm or threat.norm, []
    for eps in map(str.strip, (own.eps or threat.eps).split(",")):
        units.eps(eps, norm, "eval.eps" if own.eps else "attack.eps")
        chosen += [suites.together(suite, norm, eps) for suite in own.suite.split(";")] if own.suite else suites.alone(
            own.attacks, norm, eps)
    return tuple(chosen)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights of a run.

    Attributes:
        step: that they are of.
        names: "best", "last", "ema" or the step; "best" and "last" of one step are one.
    """

    step: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """A suite to be run on a checkpoint.

    Attributes:
        suite: the attacks.
        checkpoint: what they attack.
        entry: id of the measurement of the first name.
        is_measured: whether there is a measurement of every name at this step.
        was_reliable: whether that is one that can be trusted.
    """

    suite: Suite
    checkpoint: Checkpoint
    entry: str
    is_measured: bool
    was_reliable: bool

    @property
    def what(self) -> str:
        return f"the {' and '.join(self.checkpoint.names)} checkpoint (step {self.checkpoint.step})"


def jobs(chosen: Sequence[Suite], checkpoints: Sequence[Checkpoint], known: Sequence[dict[str, Any]], *, n: int,
         seed: int) -> list[Job]:
    """A job for each suite and checkpoint.

    Args:
        chosen: suites.
        checkpoints: what they attack.
        known: measurements of the workdir.
        n, seed: test images, and seed of the attacks.
    """
    done = {(entry["id"], entry["step"]): not entry["unreliable"] for entry in known}
    found = []
    for checkpoint in checkpoints:
        for suite in chosen:
            ids = [results.entry_id({"checkpoint": name, "attack": suite.name, "norm": suite.norm, "eps": suite.eps,
                                     "settings": suite.settings, "n": n, "seed": seed})
                   for name in checkpoint.names]
            found.append(Job(suite, checkpoint, ids[0], all((entry, checkpoint.step) in done for entry in ids),
                             done.get((ids[0], checkpoint.step), False)))
    return found
