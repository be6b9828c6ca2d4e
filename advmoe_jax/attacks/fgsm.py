"""The fast gradient sign method (Goodfellow et al., ICLR 2015) and its l2 and l1 forms: one step of size eps."""

import dataclasses

from advmoe_jax.attacks import build, objectives, pgd, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.ops import balls

ABOUT = About(balls.NORMS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of FGSM, as those of pgd.Config with the same names."""

    norm: str = settings.norm(ABOUT)
    eps: str | float = settings.eps()
    loss: str | objectives.Objective = settings.loss()


def label(config: Config) -> str:
    """As tables name it: "fgsm"."""
    return "fgsm"


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`: one step of PGD from the clean image, kept as it is."""
    return pgd.make(pgd.Config(config.norm, config.eps, num_steps=1, step_size="1 eps", start="none",
                               loss=config.loss, keep="last"))
