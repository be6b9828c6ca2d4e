"""Scores of weights by what their output matters to the logits: importance that is passed down from layer to layer.

Yu et al., "NISP: Pruning Networks using Neuron Importance Score Propagation", CVPR 2018, eq. 8: the neurons of a layer
matter as |w|^T times what those above matter, pools and ReLUs left out. In EED (CVPR 2025) weights are pruned: each
gets its size times the importance of its output, so that the scores that leave an input sum to its importance.
Convolutions count with the sum over their positions. A norm is a factor of what it reads. Where paths join, what they
matter adds up, on one scale. The original ranks the last outputs by features; here every logit matters alike.

I input, O stored output channels, w channels that an image computes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.ops import routing, trace
from advmoe_jax.pruning import magnitude, scored
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("NIS", "CVPR 2018", "weight", leaves_out="the ranking of the last features")
Config = magnitude.Config


def score(subject: Subject, cfg: Config) -> dict[str, jax.Array]:
    """{path of a layer: array like its kernel}, signed."""
    matters = output_scores(subject)
    if missing := [spec.path for spec in subject.convs if spec.path not in matters]:
        raise UserError(f"nis follows one network of convolutions and linear layers, and {missing[0]} is none of them: "
                        "expected another score")
    return scored.signed(subject, {
        spec.path: np.abs(subject.leaf(f"{spec.path}/kernel")) * matters[spec.path] for spec in subject.convs})


def masks(subject: Subject, cfg: Config) -> tuple[dict, dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    return scored.largest(subject, score(subject, cfg), cfg), {}


def output_scores(subject: Subject) -> dict[str, np.ndarray]:
    """{path of a layer: (O,) float64}, what its outputs matter before the norm that follows.

    The network is run on one image of ones with every layer replaced by its matrix of sizes, and every norm by the size
    of its factor. That is linear, as nothing is negative, and its gradient is the importance. In float64,
    since the products of many layers leave float32.
    """
    layers = {spec.path: spec for spec in subject.layers if len(spec.kernel) in (2, 4) and not spec.is_gathered}
    starts: dict[str, tuple[int, ...]] = {}

    def run(x, replace):
        """The sum of the logits, with replace(path, module, input) for each layer."""
        def replaced(call, args, kwargs, context):
            module, path = context.module, "/".join(context.module.path)
            if context.method_name == "__call__" and path in layers:
                return replace(path, module, args[0])
            if context.method_name == "__call__" and trace.is_norm(module):
                return args[0] * _channels(subject.factor(path), args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(replaced), jax.disable_jit():  # what jit has traced would not be intercepted
            return jnp.sum(subject.apply(subject.variables, x))

    def note(path, module, x):
        starts[path] = _starts(layers[path], getattr(module, "num_experts", 1))
        return jnp.zeros((1, *_positions(layers[path]), layers[path].width), x.dtype)

    def slopes(taps, matrices, x):
        def matrix(path, module, x):
            y = x.reshape(-1, x.shape[-1])[:1] @ matrices[path]  # all positions are the same
            return jnp.broadcast_to(_channels(y, x), taps[path].shape) + taps[path]

        return run(x, matrix)

    with jax.enable_x64(True):
        x = jnp.ones((1, *_image(subject)))
        jax.eval_shape(lambda x: run(x, note), x)
        taps = {path: np.zeros((1, *_positions(layers[path]), layers[path].width)) for path in starts}
        matrices = {path: _matrix(subject, layers[path], starts[path]) for path in starts}
        found = jax.device_get(jax.jit(jax.grad(slopes))(taps, matrices, x))
    return {path: _stored(layers[path], starts[path], of.reshape(-1, of.shape[-1]).sum(0))
            for path, of in found.items()}


def _image(subject):
    """The shape of an image that the network takes."""
    if subject.x is not None:
        return subject.x.shape[1:]
    first = next(spec for spec in subject.layers if not spec.inputs)
    return (*(size * first.stride for size in first.out_size), first.kernel[-2] * first.groups)


def _positions(spec):
    """The axes between batch and channels of what a layer gives."""
    return spec.out_size if len(spec.kernel) == 4 else spec.out_size[:1] if spec.out_size[0] > 1 else ()


def _channels(values, x):
    """(C,) or (1, C) as it broadcasts to x (..., C)."""
    return jnp.reshape(values, (1,) * (x.ndim - 1) + (-1,))


def _starts(spec: LayerSpec, experts: int) -> tuple[int, ...]:
    """The first stored channel of each expert."""
    return routing.offsets(experts, spec.width, spec.kernel[-1], "shared") if spec.routed else (0,)


def _matrix(subject, spec, starts):
    """(I, w) sizes of a layer's weights, summed over positions; of several experts the mean."""
    sizes = np.abs(subject.leaf(f"{spec.path}/kernel"))
    sizes = sizes.sum((0, 1)) if sizes.ndim == 4 else sizes
    sizes = np.mean([sizes[:, start:start + spec.width] for start in starts], 0)
    if spec.groups == 1:
        return sizes
    whole, (inputs, outputs) = np.zeros((len(sizes) * spec.groups, spec.width)), (len(sizes), spec.width // spec.groups)
    for group in range(spec.groups):
        of = slice(group * outputs, (group + 1) * outputs)
        whole[group * inputs:(group + 1) * inputs, of] = sizes[:, of]
    return whole


def _stored(spec, starts, values):
    """(O,) of (w,): each stored channel serves one expert, or several of them."""
    found = np.zeros(spec.kernel[-1])
    for start in starts:
        found[start:start + spec.width] += values / len(starts)
    return found
