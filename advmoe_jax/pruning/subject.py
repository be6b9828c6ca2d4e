"""The network that is to be pruned, as methods read it.

B images, H W height and width, C channels, I input channels, O stored output channels, w channels that an image
computes, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from advmoe_jax.core import layer_spec, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.pruning.channels import Channels, removable

KERNELS = ("3x3", "all", "every")
_AT_ONCE = 128  # images of one evaluation
_NORM_EPSILON = 1e-5


def of_rate(layers: tuple[LayerSpec, ...], kernels: str, prunable: frozenset[str]) -> tuple[LayerSpec, ...]:
    """The layers that a rate is of.

    Args:
        layers: of a network.
        kernels: "3x3" or "all" convolutions inside blocks; or "every" convolution and linear layer.
        prunable: paths of those that may lose anything.
    """
    found = layer_spec.kernels(layers) if kernels == "every" else layer_spec.block_convs(layers, kernels)
    return tuple(spec for spec in found if spec.path in prunable)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained network and what is to be kept of it.

    Attributes:
        apply: (variables, x (B, H, W, C)) -> logits (B, K), in evaluation mode, of linen modules.
        variables: with "params".
        layers: of the network, as traced.
        prunable: paths of those that may lose anything.
        rate: share of the multiply-accumulates of `convs` that is removed.
        kernels: which layers that share is of, one of KERNELS.
        x: (B, H, W, C) images for scores, or None.
        y: (B,) their labels, or None.
        given: masks that it has already, by the path of their leaf.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    layers: tuple[LayerSpec, ...]
    prunable: frozenset[str]
    rate: Fraction
    kernels: str = "3x3"
    x: np.ndarray | None = None
    y: np.ndarray | None = None
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def convs(self) -> tuple[LayerSpec, ...]:
        """The layers that methods for kernels and weights prune."""
        return of_rate(self.layers, self.kernels, self.prunable)

    @property
    def budget(self) -> Fraction:
        """Multiply-accumulates that are left."""
        return sum(spec.macs for spec in self.layers) - self.rate * sum(spec.macs for spec in self.convs)

    def channels(self, coupled: bool = False) -> tuple[Channels, ...]:
        """The groups of channels that may go, see `channels.removable`."""
        return tuple(group for group in removable(self.layers, coupled)
                     if all(spec.path in self.prunable for spec in group.writers))

    def has(self, path: str) -> bool:
        """Whether there is such a parameter."""
        return path in self._leaves

    def leaf(self, path: str) -> np.ndarray:
        """A parameter by its path, float64."""
        return np.asarray(self._leaves[path], np.float64)

    @functools.cached_property
    def _leaves(self) -> Mapping[str, Any]:
        return tree.named_leaves(self.variables["params"])

    def windows(self, spec: LayerSpec) -> tuple[slice, ...]:
        """The filters of each expert in a layer's kernel; where windows overlap, or nothing is routed, all as one."""
        stored = spec.kernel[-1]
        width = spec.width if spec.routed and stored % spec.width == 0 else stored
        return tuple(slice(start, start + width) for start in range(0, stored, width))

    def norm_factor(self, spec: LayerSpec) -> np.ndarray:
        """(w,) `factor` of the norm behind a layer; 1 without a norm."""
        return self.factor(spec.norm) if spec.norm else np.ones(spec.width)

    def factor(self, norm: str) -> np.ndarray:
        """(C,) size of the factor that a norm has for each channel, by its path: |scale| / sqrt(running variance),
        |scale| for a norm without running statistics."""
        var = tree.named_leaves(self.variables.get("batch_stats", {})).get(f"{norm}/var")
        scale = np.abs(self.leaf(f"{norm}/scale")) if self.has(f"{norm}/scale") else 1.0
        return scale if var is None else scale / np.sqrt(np.asarray(var, np.float64) + _NORM_EPSILON)

    def stored(self, spec: LayerSpec, values: np.ndarray) -> np.ndarray:
        """(O,) of numbers (w,) for each channel that an image computes: those of every expert, one after the other; the
        mean for all where experts overlap."""
        count = spec.kernel[-1]
        return np.resize(values, count) if count % len(values) == 0 else np.full(count, np.mean(values))

    def filters(self, spec: LayerSpec, values: np.ndarray | None = None) -> list[np.ndarray]:
        """Of each window of a layer its filters as rows, (w, k * k * I), of its kernel or of `values` like it."""
        kernel = self.leaf(f"{spec.path}/kernel") if values is None else np.asarray(values, np.float64)
        return [kernel[..., window].reshape(-1, kernel[..., window].shape[-1]).T for window in self.windows(spec)]

    def inputs(self, spec: LayerSpec, values: np.ndarray | None = None) -> np.ndarray:
        """(I, everything else): the weights by the input channel that they read."""
        kernel = self.leaf(f"{spec.path}/kernel") if values is None else np.asarray(values, np.float64)
        if spec.groups > 1:
            parts = np.split(kernel, spec.groups, -1)
            return np.concatenate([np.moveaxis(part, -2, 0).reshape(part.shape[-2], -1) for part in parts])
        return np.moveaxis(kernel, -2, 0).reshape(kernel.shape[-2], -1)

    def gradients(self) -> list[Mapping[str, np.ndarray]]:
        """Of each part of the images, the gradient of the mean cross-entropy by path."""
        @jax.jit
        def slope(variables, x, y):
            def loss(params):
                logits = self.apply({**variables, "params": params}, x)
                return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], -1))

            return jax.grad(loss)(variables["params"])

        if self.y is None:
            raise UserError("this method reads gradients: expected images with labels, (x, y)")
        return [tree.named_leaves(jax.device_get(slope(self.variables, x, y)))
                for x, y in zip(self.parts(self.x), self.parts(self.y))]

    def features(self, paths: tuple[str, ...]) -> dict[str, np.ndarray]:
        """{path: (B, ..., C)}, what modules give for the images."""
        @jax.jit
        def run(variables, x):
            found = {}

            def keep(call, args, kwargs, context):
                y = call(*args, **kwargs)
                path = "/".join(context.module.path)
                if context.method_name == "__call__" and path in paths:
                    found[path] = y
                return y

            with nn.intercept_methods(keep), jax.disable_jit():  # what jit has traced would not be intercepted
                self.apply(variables, x)
            return found

        parts = [jax.device_get(run(self.variables, x)) for x in self.parts(self.x)]
        return {path: np.concatenate([part[path] for part in parts]) for path in paths}

    def parts(self, values):
        """Images or labels, so many at once as are evaluated together."""
        if values is None:
            raise UserError("this method reads images: expected some")
        return [values[start:start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE)]
