"""Scores of weights by what their removal would change of the loss, to second order: h * w^2 / 2, "ASE" in EED.

Adversarial saliency of MAD, Lee et al., "Masking Adversarial Damage", CVPR 2022, as EED (CVPR 2025, eq. 10) takes it:
on attacked images. The Hessian h is the mean of squared gradients of single images, or MAD's Kronecker factors. MAD
scores steps towards a learned soft mask; here the step removes the weight.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import losses
from advmoe_jax.pruning import magnitude, scored
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
    """{path: |G_oo w (w A)_j| / 2}, o being the output and j the rest of a weight's place.

    A is the second moment of what a layer reads, patch by patch, and G that of the gradient of what it gives. w A is
    the gradient of half the sum of squares of the layer's output, its input being a constant. It may have another sign
    than w: the size counts.
    """
    params, layers = subject.variables["params"], {spec.path: spec for spec in subject.convs}

    def run(params, x, at):
        """The logits. at(path) gives what is done to the input of a layer, and to its output and module."""
        def watched(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path not in layers:
                return call(*args, **kwargs)
            before, after = at(path)
            y = call(before(args[0]), *args[1:], **kwargs)
            return after(y, context.module)

        with nn.intercept_methods(watched), jax.disable_jit():
            return subject.apply({**subject.variables, "params": params}, x)

    @jax.jit
    def moments(params, x, y):
        shapes = {}

        def note(path):
            def after(y, module):
                shapes[path] = y
                return y

            return (lambda x: x), after

        jax.eval_shape(lambda x: run(params, x, note), x)

        def surprise(taps):
            logits = run(params, x, lambda path: ((lambda x: x), lambda y, module: y + taps[path]))
            return jnp.sum(losses.cross_entropy(logits, y))

        def energy(params):
            found = []

            def half_squares(path):
                def after(y, module):
                    if module.has_variable("params", "bias"):
                        y -= module.get_variable("params", "bias").reshape((1,) * (y.ndim - 1) + (-1,))
                    found.append(jnp.sum(jnp.square(y)))
                    return y

                return jax.lax.stop_gradient, after

            run(params, x, half_squares)
            return sum(found) / 2

        slopes = jax.grad(surprise)({path: jnp.zeros(of.shape, of.dtype) for path, of in shapes.items()})
        outer = {path: jnp.sum(jnp.square(slope), tuple(range(slope.ndim - 1))) for path, slope in slopes.items()}
        return outer, jax.grad(energy)(params)

    total = None
    for x, y in zip(subject.parts(subject.x), subject.parts(subject.y)):
        outer, inner = jax.device_get(moments(params, jnp.asarray(x), jnp.asarray(y)))
        found = outer, {path: tree.named_leaves(inner)[f"{path}/kernel"] for path in layers}
        total = found if total is None else jax.tree.map(np.add, total, found)
    outer, inner = total
    return {path: np.abs(subject.stored(spec, np.asarray(outer[path], np.float64)) * subject.leaf(f"{path}/kernel")
                         * np.asarray(inner[path], np.float64)) / 2 for path, spec in layers.items()}
