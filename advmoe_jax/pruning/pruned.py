"""Prunes a network: the method scores and selects, and what it selects becomes masks of the parameters."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from flax.core import unfreeze

from advmoe_jax.core import fields, find, masked, tree
from advmoe_jax.core.errors import UserError, one_of, unknown_name
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.ops import masks as masking
from advmoe_jax.ops import trace
from advmoe_jax.pruning import channels
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import KERNELS, Subject, of_rate

ROOM = ("pruning", "scores", "masks")
"""Where methods are, and what their modules define, one of them."""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What is left of a network.

    Attributes:
        about: of the method.
        masks: like the parameters, bool, None where dense.
        variables: with zeros where the masks have them.
        plan: {path of a layer: {"kept": ..., ...}}, what the method says of it, as JSON.
        macs: multiply-accumulates of an image, before and after.
        params: parameters, before and after.
    """

    about: About
    masks: Any
    variables: Any
    plan: Mapping[str, Any]
    macs: tuple[int, int]
    params: tuple[int, int]


def prune(apply: Callable[[Any, jax.Array], jax.Array], variables: Any, example: Any, *, method: str = "srgkp",
          rate: str | float | Fraction = "7/16", kernels: str = "3x3", skip: str = r"(^|/)router/",
          **settings: Any) -> Pruned:
    """Prunes any network of linen modules.

    Channels are removed with the norm behind them and with the weights that read them. Methods for kernels and weights
    prune the convolutions inside blocks. All meet the same budget: that of removing the share `rate` of those
    convolutions' multiply-accumulates. Train on with `ops.masks.apply` after each update, and nothing comes back.

    Args:
        apply: (variables, x) -> logits (B, K), in evaluation mode.
        variables: with "params"; weights are not changed in place.
        example: (B, H, W, C) images as `apply` takes them; (images, labels) for methods that read gradients, attacked
            images for those that say so in their ABOUT.
        method: a module of advmoe_jax.pruning with `scores` or `masks`.
        rate: above 0 and below 1, a number or text such as "7/16".
        kernels: the layers that the rate is of: "3x3" or "all" convolutions inside blocks; or, for methods that remove
            weights, "every" convolution and linear layer.
        skip: regular expression; layers whose path has a match stay whole.
        **settings: of the method's Config.
    Raises:
        UserError: an unknown method or setting, a rate that leaves no whole kernels, a network without such layers.
    """
    x, y = example if isinstance(example, tuple) else (example, None)
    variables = unfreeze(variables)
    if "params" not in variables:
        raise UserError(f"variables are {', '.join(variables)}: expected a dict with 'params', as linen's init gives")
    layers = trace.layers_of(lambda x: apply(variables, x), jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
    subject = of(apply, variables, layers, rate, kernels, skip, x, y)
    module = find.module(ROOM[0], method, defines=ROOM[1:], kind="method")
    return choose(subject, method, _config(module, method, settings))


def of(apply: Callable, variables: Any, layers: tuple, rate: Any, kernels: str = "3x3", skip: str = "",
       x: Any = None, y: Any = None, given: Mapping[str, Any] | None = None) -> Subject:
    """The subject that methods read; arguments as `prune`.

    Raises:
        UserError: a rate out of range, a pattern that is none, a network without convolutions in blocks.
    """
    prunable, _ = layers_of_rate(layers, kernels, skip)
    return Subject(apply, variables, layers, prunable, channels.share_of(rate), kernels, x, y, given or {})


def layers_of_rate(layers: tuple[LayerSpec, ...], kernels: str, skip: str, unit: str = "weight") -> tuple[
        frozenset[str], tuple[LayerSpec, ...]]:
    """The paths of the layers that `skip` leaves, and of these the layers that a rate of such units is of.

    Arguments as `prune` and `masks.select`.

    Raises:
        UserError: a pattern that is none, or nothing is left.
    """
    one_of("kernels", kernels, KERNELS)
    try:
        skipped = re.compile(skip) if skip else None
    except re.error as error:
        raise UserError(f"skip is {skip!r}: expected a regular expression ({error})") from None
    prunable = frozenset(spec.path for spec in layers if not (skipped and skipped.search(spec.path)))
    found = selecting.with_unit(of_rate(layers, kernels, prunable), unit)
    if not found:
        which = "convolution or linear layer" if kernels == "every" else f"{kernels} convolution inside a block"
        raise UserError(f"no {which} of {len(layers)} layers: expected a convolutional network of linen modules, and a "
                        "`skip` that leaves some")
    return prunable, found


def choose(subject: Subject, method: str, cfg: Any) -> Pruned:
    """Prunes by one method.

    Args:
        subject: the network.
        method: name of its module.
        cfg: its Config, or None.
    """
    module = find.module(ROOM[0], method, defines=ROOM[1:], kind="method")
    if subject.kernels == "every" and module.ABOUT.unit != "weight":
        raise UserError(f"kernels is 'every': expected '3x3' or 'all' with method {method}, which removes "
                        f"{module.ABOUT.unit}s, not weights")
    if module.ABOUT.needs_images and subject.x is None:
        raise UserError(f"method {method} reads {' and '.join(module.ABOUT.reads)}: expected images, with labels")
    found, plan = module.masks(subject, cfg) if hasattr(module, "masks") else _channels(subject, module, cfg)
    params = subject.variables["params"]
    masks = masking.of_leaves(params, {f"{path}/kernel": np.asarray(mask) for path, mask in found.items()})
    masks = masking.joined(masking.cover_norms(masks, params, subject.layers),
                           masking.of_leaves(params, subject.given))
    shapes = {name: leaf.shape for name, leaf in tree.named_leaves(params).items()}
    kept = masked.shares(shapes, masks)
    return Pruned(
        module.ABOUT, masks, {**subject.variables, "params": masking.apply(params, masks)}, plan,
        (sum(spec.macs + spec.products for spec in subject.layers),
         int(sum(spec.macs * kept.get(f"{spec.path}/kernel", 1) + spec.products for spec in subject.layers))),
        (tree.size(params), masked.kept(shapes, masks)))


def _channels(subject: Subject, module: Any, cfg: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Masks that keep the channels of the largest scores within the budget, and which they are."""
    groups = subject.channels(hasattr(module, "coupled") and module.coupled(cfg))
    weights = module.weights(subject, cfg) if hasattr(module, "weights") else None
    counts = channels.fit(subject.layers, groups, subject.budget, weights)
    scores = module.scores(subject, cfg)
    kept = {group.name: channels.largest(scores[group.name], counts[group.name]) for group in groups}
    plan = {name: {"kept": np.flatnonzero(mask).tolist()} for name, mask in kept.items()}
    return channels.removing(groups, kept), plan


def _config(module: Any, method: str, settings: Mapping[str, Any]) -> Any:
    """The method's Config with what is given, checked."""
    own = getattr(module, "Config", None)
    known = fields.settings(own) if own else {}
    for name, value in settings.items():
        if name not in known:
            raise unknown_name(f"setting of method {method}", name, known)
        known[name].check(name, value)
    return own(**settings) if own else None
