"""MAD: weights go whose masking does adversarial images the least damage, by the loss to second order.

Lee et al., "Masking Adversarial Damage: Finding Adversarial Saliency for Robust and Sparse Network", CVPR 2022. On each
part of the attacked images soft masks of all weights, softplus(m), are trained by Adam to lower the cross-entropy. With
dw = w - w softplus(m) the saliency of a weight is G_oo dw_oj (dw A)_oj / 2, G and A being the Kronecker factors of the
masked network's layer (`pruning.kfac`), and the mean over the parts counts. The lowest go: of all convolutions
together, and of each output of a linear layer by itself. Biases stay whole, which the released code masks and prunes.
The paper trains what is left by a loss like MART's.

B images of a part, S places of a layer's output, O outputs, j the rest of a weight's place.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advmoe_jax.core import shares
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import losses
from advmoe_jax.pruning import kfac
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("MAD", "CVPR 2022", "weight", reads=("gradients",), leaves_out="masks of biases", attacked=True)
_LEAST, _MOST = (math.log(math.expm1(mask)) for mask in (1e-4, 1.0))  # between which m is held, as in the released code


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    scope: str = setting("global", "the same share of all convolutions together, or of each",
                         choices=("global", "layer"))
    mask_steps: int = setting(20, "steps of the soft masks on each part of the images", least=1, most=10**5)
    mask_learning_rate: float = setting(0.1, "of Adam in them", above=0, most=1e3)


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    keep, given = 1 - subject.rate, subject.given
    found = {path: np.where(given.get(f"{path}/kernel", 1), of, -np.inf) for path, of in saliency(subject, cfg).items()}
    sizes = {path: np.abs(kernel) for path, kernel in kfac.kernels(subject).items()}
    chosen = {path: _highest(of.T, sizes[path].T, keep).T for path, of in found.items() if of.ndim == 2}
    convs = {path: of for path, of in found.items() if path not in chosen}
    if cfg.scope == "layer":
        chosen |= {path: _highest(of.reshape(1, -1), sizes[path].reshape(1, -1), keep).reshape(of.shape)
                   for path, of in convs.items()}
    elif convs:
        rows, weights = (np.concatenate([of[path].ravel() for path in convs])[None] for of in (convs, sizes))
        parts = np.split(_highest(rows, weights, keep)[0], np.cumsum([of.size for of in convs.values()])[:-1])
        chosen |= {path: part.reshape(of.shape) for (path, of), part in zip(convs.items(), parts)}
    selecting.warn_of_empty(chosen)
    return chosen, {}


def saliency(subject: Subject, cfg: Config) -> dict[str, np.ndarray]:
    """{path of a layer: array like its kernel}, adversarial saliencies, of either sign.

    Args:
        subject: with attacked images and their labels.
        cfg: how soft masks are trained.
    Raises:
        UserError: there are no images, or no labels.
    """
    if subject.x is None or subject.y is None:
        raise UserError("mad reads gradients: expected attacked images with labels, (x, y)")
    params, kernels = subject.variables["params"], kfac.kernels(subject)
    train, factors = soft_masks(subject, cfg), kfac.factors(subject)
    parts = list(zip(subject.parts(subject.x), subject.parts(subject.y)))
    total = {path: np.zeros(kernel.shape) for path, kernel in kernels.items()}
    for x, y in parts:
        x, y = jnp.asarray(x), jnp.asarray(y)
        soft = train(params, kernels, x, y)
        steps = {path: kernel * (1 - soft[path]) for path, kernel in kernels.items()}
        masked = kfac.with_kernels(params, {path: kernel * soft[path] for path, kernel in kernels.items()})
        outer, inner, moved = jax.device_get((*factors(masked, steps, x, y), steps))
        for spec in subject.convs:
            places = math.prod(spec.out_size)  # A is a sum over them, G a mean
            total[spec.path] += (subject.stored(spec, np.asarray(outer[spec.path], np.float64)) * moved[spec.path]
                                 * inner[spec.path] / (2 * places * len(x)**2 * len(parts)))
    return total


def soft_masks(subject: Subject, cfg: Config) -> Callable[..., dict[str, jax.Array]]:
    """A compiled function (params, kernels {path: array}, x (B, H, W, C), y (B,)) -> masks {path: like the kernel}
    between 1e-4 and 1, which begin at 1 and are trained to lower the mean cross-entropy."""
    adam = optax.adam(cfg.mask_learning_rate)

    @jax.jit
    def run(params, kernels, x, y):
        def loss(m):
            masked = kfac.with_kernels(params, {path: kernel * jax.nn.softplus(m[path]) for path, kernel in
                                                kernels.items()})
            return jnp.mean(losses.cross_entropy(subject.apply({**subject.variables, "params": masked}, x), y))

        def step(_, carried):
            m, state = carried
            updates, state = adam.update(jax.grad(loss)(m), state)
            return jax.tree.map(lambda m, update: jnp.clip(m + update, _LEAST, _MOST), m, updates), state

        m = {path: jnp.full_like(kernel, _MOST) for path, kernel in kernels.items()}
        m, _ = jax.lax.fori_loop(0, cfg.mask_steps, step, (m, adam.init(m)))
        return {path: jnp.where(of < _MOST, jax.nn.softplus(of), 1) for path, of in m.items()}  # 1, not nearly

    return run


def _highest(rows: np.ndarray, sizes: np.ndarray, keep: Fraction) -> np.ndarray:
    """Bool of the shape of rows (R, n), in each so many of the highest as a share says. Saliencies are often 0, where a
    soft mask has stayed at 1: of equal ones the largest weights are kept, and of these the first."""
    order = np.lexsort((-sizes, -rows), 1)
    chosen = np.zeros(rows.shape, bool)
    np.put_along_axis(chosen, order[:, :shares.kept(rows.shape[1], keep)], True, 1)
    return chosen
