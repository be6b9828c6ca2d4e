"""AutoAttack on arrays: `run(logits_fn, x, y, eps, norm)`, for any model that is a function of images.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", ICML
2020. B images, K classes.
"""

import dataclasses
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import checks, objectives
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import one_of
from advmoe_jax.evaluation import black_box, flags, suites, verdicts
from advmoe_jax.evaluation.flag import Flag
from advmoe_jax.ops import balls


@dataclasses.dataclass(frozen=True)
class Report:
    """What AutoAttack found.

    Attributes:
        x_adv: (B, H, W, C) adversarial images; the clean ones where none was found or needed.
        robust: (B,) bool, classified correctly when clean and under every attack.
        standard_accuracy, robust_accuracy: fractions in [0, 1].
        found: every attempt, with predictions, margins and norms.
        flags: signs that the result cannot be trusted; `unreliable` says whether one of them is serious.
    """

    x_adv: np.ndarray
    robust: np.ndarray
    standard_accuracy: float
    robust_accuracy: float
    found: verdicts.Found
    flags: tuple[Flag, ...]

    @property
    def unreliable(self) -> bool:
        """Whether the robust accuracy cannot be trusted."""
        return any(flag.unreliable for flag in self.flags)


def run(logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array, eps: str | float, norm: str = "linf",
        key: jax.Array | None = None, suite: str = "standard", batch_size: int = 250) -> np.ndarray:
    """Adversarial images (B, H, W, C); arguments as `run_report`."""
    return run_report(logits_fn, x, y, eps, norm, key, suite, batch_size).x_adv


def run_report(logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array, eps: str | float,
               norm: str = "linf", key: jax.Array | None = None, suite: str = "standard", batch_size: int = 250
               ) -> Report:
    """Runs a suite on images; each attack gets what the ones before it left.

    Args:
        logits_fn: (B, H, W, C) images in [0, 1] -> (B, K) logits; normalisation is part of it. Best a
            `jax.tree_util.Partial(apply, variables)`: the weights of a plain closure are constants of every program.
            With suite "rand", or attacks with eot, a random model: (images, keys (B,)) -> logits.
        x: (B, H, W, C) floats in [0, 1].
        y: (B,) whole numbers, the labels.
        eps: budget in units of [0, 1], a number or a fraction such as "8/255".
        norm: "linf" | "l2" | "l1".
        key: of all randomness, one; jax.random.key(0) unless given.
        suite: a name in evaluation.suites, or a list of attacks.
        batch_size: images at a time.
    Warns:
        Each sign that the result cannot be trusted; see `Report.flags`.
    Raises:
        UserError: images outside [0, 1] by more than rounding or not finite, labels or logits of another shape or
            range, a model that jax cannot trace, or eps given in 0-255 units.
    """
    one_of("norm", norm, balls.NORMS)
    units.eps(eps, norm)
    chosen = suites.together(suite, norm, eps)
    key = jax.random.key(0) if key is None else rng.typed(key)
    is_random = any(getattr(spec.config, "eot", 0) for spec in chosen.specs)
    x = np.asarray(checks.images(x), np.float32)
    suites.check_shape(chosen, x.shape[1:])
    keys = [rng.rowwise(key, len(x))] if is_random else []
    logits_fn = objectives.partial(logits_fn, x, *keys)
    y = np.asarray(checks.labels(y, len(x), checks.classes("logits", logits_fn, x, *keys)), np.int32)
    batch_size = min(units.whole(batch_size, 1, "batch_size"), len(x))

    def source(rows):
        return {"image": jnp.asarray(x[rows]), "label": jnp.asarray(y[rows]), "index": jnp.asarray(rows, jnp.int32)}

    outputs_fn = jax.tree_util.Partial(_without_aux, logits_fn)
    judged = jax.tree_util.Partial(verdicts.one_draw, logits_fn, key) if is_random else logits_fn
    head = (jnp.asarray(array[:flags.MOST_IMAGES]) for array in (x, y))
    noticed = flags.of_model(judged, *head, key)
    log = verdicts.Memory()
    found = verdicts.run({"none": outputs_fn}, source, np.arange(len(x)), y, chosen.specs, key=key,
                         batch_size=batch_size, survivors_only=True, log=log, is_random=is_random,
                         checks=() if is_random else black_box.checks(chosen.specs))
    broken = verdicts.adversarial(found, log)
    x_adv = x.copy()
    if len(broken["index"]):
        x_adv[broken["index"]] = broken["x_adv"]
    robust, noticed = found.survivors(), noticed + flags.not_finite(found) + (
        black_box.flags(found) + flags.of_attempts(found))
    for flag in noticed:
        if flag.unreliable:
            warnings.warn(f"evaluation UNRELIABLE: {flag.reason}", stacklevel=2)
    return Report(x_adv, robust, float(found.correct.mean()), float(robust.mean()), found, noticed)


def _without_aux(logits_fn, *inputs):
    return logits_fn(*inputs), {}
