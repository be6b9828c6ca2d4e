"""Signs that a robustness evaluation cannot be trusted.

Sources: AutoAttack's checks (Croce & Hein, ICML 2020); Carlini et al., "On evaluating adversarial robustness", 2019;
Tramer et al., "On adaptive attacks to adversarial example defenses", NeurIPS 2020; Pintor et al., "Indicators of
attack failure", NeurIPS 2022. B images, K classes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import driver, objectives
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import tree as trees
from advmoe_jax.evaluation import gradient_checks as gradients
from advmoe_jax.evaluation.flag import Flag
from advmoe_jax.evaluation.gradient_checks import call
from advmoe_jax.evaluation.verdicts import Fitting, Found

MOST_IMAGES = 64
_APART = 1e-4  # of logits scaled to norm 1
_MOST_WON = 0.002  # AutoAttack's
_RANDOM = ("random_bits", "threefry2x32", "random_wrap", "random_seed", "rng_bit_generator", "rng_uniform")

_finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree))


def of_model(logits_fn: jax.tree_util.Partial, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[Flag, ...]:
    """Checks a model before it is attacked.

    Args:
        logits_fn: x -> (B, K).
        x, y: images in [0, 1] and labels, of which the first MOST_IMAGES are looked at, or what fits into memory.
        key: for the random directions.
    """
    logits_fn, fits = objectives.partial(logits_fn, x), Fitting(min(MOST_IMAGES, len(x)))
    found = fits.largest(lambda size: _of_model(logits_fn, x[:size], y[:size], key))
    if fits.size < min(MOST_IMAGES, len(x)):
        found += (Flag("few_images", f"the checks looked at {fits.size} images, for want of memory: expected "
                                     f"{min(MOST_IMAGES, len(x))}", unreliable=False),)
    return found


def _of_model(logits_fn, x, y, key):
    logits = meshes.fetch(call(logits_fn, x))
    masked = np.isneginf(logits).all(0)
    finite = np.isfinite(logits[:, ~masked]).all(-1)
    if masked.all() or not finite.all():
        return (Flag("not_finite", f"{np.mean(~finite):.0%} of the clean images have a NaN or infinite logit: expected "
                                   "none, or a class that is -inf for all images"),)
    correct = logits.argmax(-1) == meshes.fetch(y)
    apart = _apart(logits_fn, x)
    found = [_masked(masked), _randomised(logits_fn, x, logits, apart), _probabilities(logits),
             _batch(logits_fn, x, logits, apart), gradients.dead_gradient(logits_fn, x, y, logits, correct),
             gradients.gradient(logits_fn, x, y, key), gradients.shattered(logits_fn, x, y, key, logits),
             gradients.unbounded(logits_fn, x, y, key, correct),
             *gradients.on_budgets(logits_fn, x, y, key, correct), _few_classes(logits), _dynamic(logits_fn, x)]
    return tuple(filter(None, found))


def of_weights(variables: Any) -> tuple[Flag, ...]:
    """Checks that parameters and statistics are finite; those of a router may be NaN while the logits are not."""
    names = [name for name, ok in trees.named_leaves(meshes.fetch(_finite(variables))).items() if not ok]
    if names:
        return (Flag("not_finite", f"{len(names)} tensors of the checkpoint are NaN or infinite somewhere, {names[0]} "
                                   "the first: expected finite weights"),)
    return ()


def of_views(logits_fn: jax.tree_util.Partial, views: Mapping[str, jax.tree_util.Partial], x: jax.Array
             ) -> tuple[Flag, ...]:
    """Checks that other gradients of a model, {name: x -> (B, K)}, come with the values of its plain one."""
    logits, most = _scaled(meshes.fetch(call(logits_fn, x))), _apart(logits_fn, x)
    other = [name for name, view in views.items() if not np.allclose(
        _scaled(meshes.fetch(call(view, x))), logits, rtol=0, atol=most, equal_nan=True)]
    if other:
        return (Flag("other_values", f"through the gradient {', '.join(other)} the model has other logits than for its "
                                     "users: expected the same, attacks would aim elsewhere"),)
    return ()


def not_finite(found: Found) -> tuple[Flag, ...]:
    """Checks logits, and what else the model says, of all images, clean and attacked."""
    of = {"clean": found.clean} | {f"{a.spec.label} ({a.view})": a.after for a in found.attempts}
    bad = {name: int(np.sum(~np.isfinite(after["margin"]))) for name, after in of.items()}
    bad = [f"{count} images, {name}" for name, count in bad.items() if count]
    if bad:
        return (Flag("not_finite", f"logits or router scores are NaN or infinite on {'; '.join(bad)}: expected none"),)
    return ()


def of_attempts(found: Found) -> tuple[Flag, ...]:
    """Checks what attacks found: those that see no gradient must not break what those that do left, at the same norm
    and no smaller a budget."""
    won = np.zeros(len(found.index), bool)
    for blind in found.own:
        if blind.spec.about.takes != "values":
            continue
        rivals = [attempt for attempt in found.own if attempt.spec.about.takes != "values" and any(
            eps <= attempt.spec.budgets.get(norm, -1) for norm, eps in blind.spec.budgets.items())]
        tried = np.any([attempt.attacked for attempt in rivals], 0) if rivals else False
        won |= blind.attacked & tried & found.survivors(rivals) & ~found.survivors([blind])
    if won.mean() > _MOST_WON:
        return (Flag("black_box_wins", f"attacks that see no gradient broke {won.sum()} of {len(won)} images that "
                                       f"every gradient attack had left: expected at most {_MOST_WON:.1%}, the "
                                       "gradients may be masked"),)
    return ()


def _apart(logits_fn, x):
    """How far apart equal logits may be, of norm 1, by the coarsest numbers in the traced program."""
    outputs = [out.aval.dtype for equation in driver.equations(jax.make_jaxpr(logits_fn)(x).jaxpr)
               for out in equation.outvars if hasattr(out.aval, "dtype")]
    return max(_APART, *(8 * float(jnp.finfo(of).eps) for of in outputs if jnp.issubdtype(of, jnp.floating)), 0.0)


def _scaled(logits):
    logits = np.where(np.isneginf(logits), 0, logits)  # a masked class
    return logits / np.maximum(np.linalg.norm(logits, axis=-1, keepdims=True), 1e-12)


def _masked(masked):
    if masked.any():
        return Flag("masked_class", f"class {', '.join(map(str, np.flatnonzero(masked)))} has a logit of -inf for all "
                                    "images: no attack can aim at it", unreliable=False)
    return None


def _randomised(logits_fn, x, logits, most):
    apart = max(np.abs(_scaled(meshes.fetch(call(logits_fn, x))) - _scaled(logits)).max() for _ in range(4))
    if apart > most:
        return Flag("randomised", f"the same images give other logits each time (by {apart:.2g} of their norm): "
                                  "expected a deterministic model, or suite=rand")
    return None


def _probabilities(logits):
    if logits.min() > -0.01 and logits.max() < 1.01 and np.allclose(logits.sum(-1), 1, atol=0.01):  # of any precision
        return Flag("probabilities", "the outputs are probabilities: expected logits, whose gradients do not vanish")
    return None


@jax.jit
def _other_batches(x):
    """The same images backwards, and the second half of them beside negatives of the first."""
    return x[::-1], jnp.concatenate([x[len(x) // 2:], 1 - x[:len(x) // 2]])


def _batch(logits_fn, x, logits, most):
    """The logits of an image must not depend on the images beside it."""
    backwards, others = _other_batches(x)
    halved = meshes.fetch(call(logits_fn, others))[:len(x) - len(x) // 2]
    turned = meshes.fetch(call(logits_fn, backwards))[::-1]
    apart = max(np.abs(_scaled(turned) - _scaled(logits)).max(),
                np.abs(_scaled(halved) - _scaled(logits[len(x) // 2:])).max())
    if apart > most:
        return Flag("batch_dependent", f"the logits of an image depend on the others in its batch (by {apart:.2g} of "
                                       "their norm): expected evaluation mode, with running statistics")
    return None


def _few_classes(logits):
    if logits.shape[-1] < 4:
        return Flag("few_classes", f"{logits.shape[-1]} classes: the DLR losses fall back to forms without the fourth "
                                   "logit, and targeted attacks have fewer targets", unreliable=False)
    return None


def _dynamic(logits_fn, x):
    """Looks for randomness and callbacks in the traced program."""
    names = {str(equation.primitive) for equation in driver.equations(jax.make_jaxpr(logits_fn)(x).jaxpr)}
    used = sorted(names & set(_RANDOM)) + sorted(name for name in names if "callback" in name)
    if used:
        return Flag("dynamic", f"the model uses {', '.join(used)}: expected a pure function of the image, or "
                               "suite=rand for a random one", unreliable=False)
    return None
