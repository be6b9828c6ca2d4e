"""FGSM and PGD with sizes in units of normalised images: the protocol of SR-GKP's tables (NeurIPS 2023, section 4).

x images (B, H, W, C) in [0, 1]. The authors run ART on images whose channels are divided by their standard deviations:
a step of s there is one of s times the channel's deviation here. FGSM is 0.01 and 0.1 (and 0.001 on Tiny-ImageNet and
ImageNet) from the predicted label, PGD 8/255 in three steps of 2/255 from the true one: weak attacks, for comparison
with those tables. Their accuracies count images that were wrong when clean and that the perturbation makes right (see
About.all_images). One thing differs: they clip CIFAR to one range for all channels, which lets pixels leave [0, 1] by
up to 0.05, and ImageNet not at all; here images stay in [0, 1].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import build, checks, driver, objectives, pgd, settings
from advmoe_jax.attacks.about import About
from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting

ABOUT = About(all_images=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the attack; the defaults are SR-GKP's FGSM on CIFAR-10."""

    eps_sd: str | float = setting("0.01", "budget in standard deviations, linf")
    num_steps: int = settings.count(1, "gradient steps; 1 is FGSM")
    step_sd: str | float = setting("1 eps", "step size in standard deviations, or 1 eps")
    labels: str = setting("predicted", "predicted, those of the clean images, as ART does when given none, or true",
                          choices=("predicted", "true"))
    std: str | float = setting("0.2023 0.1994 0.2010", "standard deviations of the channels, one number or one for "
                                                       "each, separated by spaces")
    driver: str = settings.driver()


def label(config: Config) -> str:
    """As tables name it: "fgsm-0.01sd", "pgd-3-8/255sd"."""
    return f"{'fgsm' if config.num_steps == 1 else f'pgd-{config.num_steps}'}-{config.eps_sd}sd"


def check(config: Config, channels: int) -> None:
    """Raises UserError if `std` is for images of other channels."""
    settings.check_channels("normalized", "std", config.std, channels)


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(logits_fn, key, x, y) -> x_adv`, as pgd.make does: no random start, the last iterate is kept.

    Raises:
        UserError: a setting is out of range, or there are other channels than in `std`.
    """
    config = settings.read("normalized", config)
    eps = units.eps(config.eps_sd, "", "eps_sd")
    step_size = units.step_size(config.step_sd, eps, config.num_steps, "", "step_sd")
    std = np.array([units.number(text, "normalized's std") for text in str(config.std).split()])
    if std.size == 0 or np.any(std <= 0):
        raise UserError(f"normalized has std={config.std!r}: expected numbers above 0, one for each channel")
    program = pgd.Search("linf", "none", objectives.get("ce"), keep_best=False, stops=False)

    def attack(logits_fn, key, x, y):
        x = checks.images(x)
        check(config, x.shape[-1])
        inputs = build.inputs_of(logits_fn, key, x, y, eps=(eps * std)[None, None, None],
                                 step_size=(step_size * std)[None, None, None])
        if config.labels == "predicted":
            driver.count((1, 0), x.shape[0])
            inputs.rows["y"] = _predicted(inputs.logits_fn, inputs.rows["x"])
        return jax.lax.stop_gradient(driver.run(program, inputs, config.num_steps + 1, config.driver)["x"])

    return attack


_predicted = jax.jit(lambda logits_fn, x: jnp.argmax(logits_fn(x), -1))
