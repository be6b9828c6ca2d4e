"""Scores of weights by what their removal would change of the loss, to second order: h * w^2 / 2, "ASE" in EED.

Adversarial saliency of MAD, Lee et al., "Masking Adversarial Damage", CVPR 2022, as EED (CVPR 2025, eq. 10) takes it:
on attacked images. The Hessian h is the mean of squared gradients of single images, or MAD's Kronecker factors. MAD
itself (`pruning.mad`) scores steps towards a learned soft mask; here the step removes the weight.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import losses
from advmoe_jax.pruning import kfac, magnitude, scored
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("ASE", "CVPR 2022", "weight", reads=("gradients",), leaves_out="the learned soft mask")


@dataclasses.dataclass(frozen=True)
class Config(magnitude.Config):
    """Fields of `config.system` for this method."""

    hessian: str = setting("fisher", "mean of squared gradients of single images; or Kronecker factors, of which the "
                                     "outputs' is taken by its diagonal", choices=("fisher", "kfac"))


def score(subject: Subject, cfg: Config) -> dict[str, jax.Array]:
    """{path of a layer: array like its kernel}, signed."""
    if subject.x is None or subject.y is None:
        raise UserError("ase reads gradients: expected images with labels, (x, y)")
    return scored.signed(subject, {"fisher": _fisher, "kfac": _kfac}[cfg.hessian](subject))


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    return scored.largest(subject, score(subject, cfg), cfg), {}


def _surprise(subject, params, x, y):
    """The sum of the cross-entropies."""
    logits = subject.apply({**subject.variables, "params": params}, x)
    return jnp.sum(losses.cross_entropy(logits, y))


def _fisher(subject):
    """{path: mean of g^2 times w^2 / 2}, image by image."""
    params = subject.variables["params"]

    @jax.jit
    def add(total, params, x, y):
        slope = jax.grad(lambda params: _surprise(subject, params, x, y))(params)
        return jax.tree.map(lambda sum_, g: sum_ + jnp.square(g), total, slope)

    total = jax.tree.map(jnp.zeros_like, params)
    for start in range(len(subject.x)):
        total = add(total, params, jnp.asarray(subject.x[start:start + 1]), jnp.asarray(subject.y[start:start + 1]))
    squares = tree.named_leaves(jax.device_get(total))
    return {spec.path: np.asarray(squares[f"{spec.path}/kernel"], np.float64) / len(subject.x) / 2
            * np.square(subject.leaf(f"{spec.path}/kernel")) for spec in subject.convs}


def _kfac(subject):
    """{path: |G_oo w (w A)_oj| / 2}. It may have another sign than w: the size counts."""
    params, kernels, total = subject.variables["params"], kfac.kernels(subject), None
    factors = kfac.factors(subject)
    for x, y in zip(subject.parts(subject.x), subject.parts(subject.y)):
        found = jax.device_get(factors(params, kernels, jnp.asarray(x), jnp.asarray(y)))
        total = found if total is None else jax.tree.map(np.add, total, found)
    outer, inner = total
    return {spec.path: np.abs(subject.stored(spec, np.asarray(outer[spec.path], np.float64))
                              * subject.leaf(f"{spec.path}/kernel") * np.asarray(inner[spec.path], np.float64)) / 2
            for spec in subject.convs}
