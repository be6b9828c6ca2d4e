"""Pruned experts one image at a time: what is left of ResNet-18 at 4x and 8x, and what of it is saved.

MoL (Cheng et al., WACVW 2022), appendix B, on a phone's GPU: 4x saves a factor 2.4 of FLOPs and 2.2 of latency, 8x 4.5
and 3.8, and the whole framework, with its experts in parallel, 1.8 and 3.1. Here is the time of this machine, of
networks with random weights. Zeros save nothing by themselves, so each scheme has the forms that could: filters that
are gone are left out with the channels that read them; of blocks each group of filters gathers its own columns; whole
columns leave a smaller product over patches.

I input channels, O output channels, k kernel size, P pixels, n columns that are kept.
"""

import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import unfreeze

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core import tree
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.models.layers import Conv
from advmoe_jax.models.network import Network
from advmoe_jax.ops import conv
from advmoe_jax.ops import masks as masking
from advmoe_jax.pruning import masks as selecting

_RATES = {"4x": "1/4", "8x": "1/8"}  # that are kept
_PAPER = {"4x": (2.4, 2.2), "8x": (4.5, 3.8)}
_EXPERTS = 7
_UNITS = {"irregular": "weight", "filter": "filter", "block (4,1)": "block(4,1)", "block (16,1)": "block(16,1)",
          "column": "column"}

Compute = Callable[[jax.Array, jax.Array, int], jax.Array]
"""(x, kernel, stride) -> y, of one convolution."""


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each scheme, rate and form: weights and multiply-accumulates that are left, milliseconds of one image,
    the dense network's over them, and the paper's ratios; then the experts one after the other and in parallel."""
    net, variables = nets.make(num_experts=1, model_scale=1.0)
    variables, x = jax.device_get(unfreeze(variables)), nets.images(1)
    sides = {"dense": (_plain(net), variables, 1.0, 1.0)}
    for rate, keep in _RATES.items():
        for scheme, unit in _UNITS.items():
            masked, masks = _masked(net, variables, keep, unit)
            left = sum(mask.mean() * np.prod(spec.kernel) for spec, mask in _of(net, masks))
            left /= sum(np.prod(spec.kernel) for spec, _ in _of(net, masks))
            for form, (compute, share) in _forms(net, masks, scheme).items():
                sides[f"{scheme} {rate}, {form}"] = _computed(net, compute), masked, left, share
    ms = interleaved({side: functools.partial(jax.jit(apply), jax.device_put(weights), x)
                      for side, (apply, weights, *_) in sides.items()}, (), rounds)
    rows = [_row(side, ms[side], ms["dense"] / ms[side], left, share, *_PAPER.get(
        side.rpartition(", ")[0][-2:], ("", ""))) for side, (*_, left, share) in sides.items()]
    return rows + _together(net, variables, x, rounds)


def _row(what, ms, ratio, left="", share="", flops="", latency="") -> dict[str, Any]:
    return {"what": what, "ms": ms, "dense / this": ratio, "weights left": left, "MACs executed": share,
            "FLOPs saved, paper": flops, "latency saved, paper": latency}


def _plain(net: Network):
    return lambda variables, x: net.apply(variables, x)[0]


def _of(net: Network, masks: dict[str, np.ndarray]) -> list[tuple[LayerSpec, np.ndarray]]:
    """The convolutions and their masks, broadcast to the kernels."""
    return [(spec, np.broadcast_to(masks[spec.path], spec.kernel)) for spec in net.layers if spec.path in masks]


def _masked(net: Network, variables: Any, keep: str, unit: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Variables without all but the largest units of each convolution, with the norms behind them; and the masks."""
    kernels = tree.named_leaves(variables["params"])
    convs = [spec for spec in net.layers if len(spec.kernel) == 4]
    scores = {spec.path: jnp.abs(kernels[f"{spec.path}/kernel"]) for spec in convs}
    masks = {path: np.asarray(mask) for path, mask in selecting.select(scores, keep, unit=unit, norm="l2").items()}
    every = masking.of_leaves(variables["params"], {f"{path}/kernel": mask for path, mask in masks.items()})
    every = masking.cover_norms(every, variables["params"], net.layers)
    return variables | {"params": jax.device_get(masking.apply(variables["params"], every))}, masks


def _forms(net: Network, masks: dict[str, np.ndarray], scheme: str) -> dict[str, tuple[dict[str, Compute], float]]:
    """{form: (what computes each convolution, share of their multiply-accumulates that is executed)}."""
    found = {"with zeros": ({}, 1.0)}
    if scheme == "filter":
        found["left out"] = _mean(net, {spec.path: _left_out(spec, masks) for spec, _ in _of(net, masks)})
    elif scheme == "column":
        found["smaller product"] = _mean(net, {spec.path: _columns(mask) for spec, mask in _of(net, masks)})
    elif scheme.startswith("block"):
        size = int(scheme.partition("(")[2].partition(",")[0])
        found["gathered columns"] = _mean(net, {spec.path: _gathered(mask, size) for spec, mask in _of(net, masks)})
    return found


def _mean(net, computes):
    macs = {spec.path: spec.macs for spec in net.layers}
    share = sum(macs[path] * share for path, (_, share) in computes.items()) / sum(macs[path] for path in computes)
    return {path: compute for path, (compute, _) in computes.items()}, share


def _left_out(spec: LayerSpec, masks: dict[str, np.ndarray]) -> tuple[Compute, float]:
    """Filters that are gone, and input channels that no filter before writes, are not computed."""
    def alive(path):
        return masking.kept_channels(masks[path], 4)

    writers = [np.asarray(alive(path)) for path in spec.inputs if path in masks]
    size = spec.kernel[2]
    reads = np.any(writers, 0) if writers and all(len(of) == size for of in writers) else np.ones(size, bool)
    writes = np.broadcast_to(np.asarray(alive(spec.path)), spec.kernel[3:])
    inputs, outputs = np.flatnonzero(reads), np.flatnonzero(writes)
    back = np.where(writes, np.cumsum(writes) - 1, len(outputs))

    def compute(x, kernel, stride):
        y = conv.conv2d(x[..., inputs], kernel[:, :, inputs][..., outputs], stride)
        return jnp.pad(y, ((0, 0),) * 3 + ((0, 1),))[..., back]

    return compute, reads.mean() * writes.mean()


def _columns(mask: np.ndarray) -> tuple[Compute, float]:
    """Columns that all filters lack are left out of the product."""
    kept = np.flatnonzero(mask.reshape(-1, mask.shape[-1]).any(1))

    def compute(x, kernel, stride):
        return conv.patches(x, len(mask), stride)[..., kept] @ kernel.reshape(-1, kernel.shape[-1])[kept]

    return compute, len(kept) / np.prod(mask.shape[:3])


def _gathered(mask: np.ndarray, size: int) -> tuple[Compute, float]:
    """Each group of `size` filters gathers the columns that it keeps, padded to as many as the group with most."""
    groups = mask.reshape(-1, mask.shape[-1] // size, size)[..., 0].T
    most = max(int(groups.sum(1).max()), 1)
    columns = np.zeros((len(groups), most), np.int32)
    is_kept = np.zeros((len(groups), most, 1), np.float32)
    for group, kept in enumerate(groups):
        count = int(kept.sum())
        columns[group, :count], is_kept[group, :count] = np.flatnonzero(kept), 1

    def compute(x, kernel, stride):
        rows = kernel.reshape(-1, len(groups), size)
        weights = rows[columns, np.arange(len(groups))[:, None]] * is_kept
        found = jnp.einsum("bhwgn,gno->bhwgo", conv.patches(x, len(mask), stride)[..., columns], weights)
        return found.reshape(*found.shape[:3], -1)

    return compute, most / groups.shape[1]


def _computed(net: Network, computes: dict[str, Compute]):
    """The function of a network whose convolutions are computed in other ways."""
    def other(call, args, kwargs, context):
        layer, path = context.module, "/".join(context.module.path)
        if not isinstance(layer, Conv) or context.method_name != "__call__" or path not in computes:
            return call(*args, **kwargs)
        return computes[path](args[0], layer.get_variable("params", "kernel"), layer.stride)

    def apply(variables, x):
        with nn.intercept_methods(other):
            return net.apply(variables, x)[0]

    return apply


def _together(net, variables, x, rounds) -> list[dict[str, Any]]:
    """All experts of a mixture, dense and with three quarters of the filters gone, in a row and by threads."""
    masked, masks = _masked(net, variables, _RATES["4x"], "filter")
    compute, _ = _forms(net, masks, "filter")["left out"]
    pool, sides = concurrent.futures.ThreadPoolExecutor(_EXPERTS), {}
    for name, apply, weights in (("dense", _plain(net), variables), ("filter 4x", _computed(net, compute), masked)):
        run = functools.partial(jax.jit(apply), jax.device_put(weights), x)
        sides[f"{_EXPERTS} experts, {name}, one after the other"] = lambda run=run: [
            jax.block_until_ready(run()) for _ in range(_EXPERTS)]
        sides[f"{_EXPERTS} experts, {name}, in parallel"] = lambda run=run: list(pool.map(
            lambda _: jax.block_until_ready(run()), range(_EXPERTS)))
    ms = interleaved(sides, (), rounds)
    first = ms[next(iter(sides))]
    return [_row(side, ms[side], first / ms[side]) for side in sides]
