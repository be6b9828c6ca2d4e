"""The loss to second order, layer by layer: K-FAC's blocks, times steps of the weights.

Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015; of convolutions
Grosse & Martens, ICML 2016. A is the second moment of what a layer reads, patch by patch, G that of the gradient of
what it gives.

B images, O stored output channels, j the rest of a weight's place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from advmoe_jax.core import tree
from advmoe_jax.ops import losses
from advmoe_jax.ops import masks as masking
from advmoe_jax.pruning.subject import Subject

Factors = Callable[[Any, Mapping[str, jax.Array], jax.Array, jax.Array],
                   tuple[dict[str, jax.Array], dict[str, jax.Array]]]
"""(params, steps {path: like the kernel}, x (B, H, W, C), y (B,)) -> ({path: (w,) G_oo}, {path: (step A)_oj like the
kernel}), sums over images and places."""


def factors(subject: Subject) -> Factors:
    """A compiled function that gives the diagonal of G and the product of a step with A, of each of `subject.convs`.

    With J the derivative of a layer's output by its kernel, its input being a constant, step A is J^T J step: patches
    are never laid out.
    """
    paths = {spec.path for spec in subject.convs}

    def outputs(params, x, at):
        """The logits. at(path) gives what is done to the input of a layer, and to its output."""
        def watched(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path not in paths:
                return call(*args, **kwargs)
            before, after = at(path)
            return after(call(before(args[0]), *args[1:], **kwargs))

        with nn.intercept_methods(watched), jax.disable_jit():  # what jit has traced would not be intercepted
            return subject.apply({**subject.variables, "params": params}, x)

    @jax.jit
    def run(params, steps, x, y):
        def given(kernels):
            found = {}

            def keep(path):
                def after(y):
                    found[path] = y
                    return y

                return jax.lax.stop_gradient, after

            outputs(with_kernels(params, kernels), x, keep)
            return found

        def surprise(taps):
            logits = outputs(params, x, lambda path: ((lambda x: x), lambda y: y + taps[path]))
            return jnp.sum(losses.cross_entropy(logits, y))

        leaves = tree.named_leaves(params)
        found, pull = jax.vjp(given, {path: leaves[f"{path}/kernel"] for path in paths})
        taps = jax.tree.map(jnp.zeros_like, found)
        [moved] = jax.vjp(pull, taps)[1]((steps,))  # J step: the package's convolutions have no forward mode
        [inner] = pull(moved)
        return {path: jnp.sum(jnp.square(slope), tuple(range(slope.ndim - 1)))
                for path, slope in jax.grad(surprise)(taps).items()}, inner

    return run


def kernels(subject: Subject) -> dict[str, jax.Array]:
    """{path: kernel} of `subject.convs`, as they are stored."""
    leaves = tree.named_leaves(subject.variables["params"])
    return {spec.path: jnp.asarray(leaves[f"{spec.path}/kernel"]) for spec in subject.convs}


def with_kernels(params: Any, kernels: Mapping[str, jax.Array]) -> Any:
    """Parameters with other kernels, {path of a layer: kernel}."""
    other = masking.of_leaves(params, {f"{path}/kernel": kernel for path, kernel in kernels.items()})
    return masking.map_masked(lambda _, kernel: kernel, params, other)
