"""Grouped-kernel pruning: the seconds of SR-GKP's search, and dense, masked and compact networks at inference.

ResNets for CIFAR and VGG with random weights; 7/16 of the block convolutions goes, in 8 groups of filters.
"""

import functools
import time
from typing import Any

import jax
import numpy as np
from flax.core import unfreeze

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core import config as configs
from advmoe_jax.core.layer_spec import block_convs
from advmoe_jax.models import compact, network
from advmoe_jax.models.network import Network
from advmoe_jax.ops import gathered
from advmoe_jax.pruning import pruned, srgkp

_RATE, _GROUPS, _BATCH = "7/16", 8, 64
_SEARCHED = {f"ResNet-{depth}": dict(name="cifar_resnet", depth=depth, width=16) for depth in (20, 56, 110)}
_TIMED = {"ResNet-56": dict(name="cifar_resnet", depth=56, width=16), "VGG-16": dict(name="vgg", depth=16, width=64)}


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each search, timed once, whatever `rounds` is; and for each network its forms at inference:
    milliseconds, the time of the dense network over this one's, and the same by multiply-accumulates."""
    return [*(_search(name, fields) for name, fields in _SEARCHED.items()),
            *(row for name, fields in _TIMED.items() for row in _inference(name, fields, rounds))]


def _network(fields) -> Network:
    cfg = configs.default(model=fields["name"]).model
    cfg.update(dict(num_experts=1, model_scale=1.0) | fields)
    return network.make(cfg, nets.IMAGE_SHAPE, nets.CLASSES)


def _compact(fields) -> Network:
    config = configs.default(model="compact")
    configs.override(config, f"model.base={fields['name']}")
    config.model.update(dict(num_experts=1, model_scale=1.0, groups=_GROUPS, rate=_RATE) | fields | {"name": "compact"})
    return compact.model(config.model, nets.IMAGE_SHAPE, nets.CLASSES)


def _search(name, fields) -> dict[str, Any]:
    """All convolutions in blocks, one after the other."""
    numbers = np.random.default_rng(0)
    kernels = [numbers.normal(size=spec.kernel) for spec in block_convs(_network(fields).layers)]
    start = time.perf_counter()
    for kernel in kernels:
        srgkp.plan(kernel, groups=_GROUPS, rate=_RATE)
    return _row(f"search, {name}", 1000 * (time.perf_counter() - start))


def _inference(name, fields, rounds) -> list[dict[str, Any]]:
    dense, net, x = _network(fields), _compact(fields), nets.images(_BATCH)
    variables = jax.device_get(unfreeze(jax.jit(dense.init)(jax.random.key(0))))
    subject = pruned.of(lambda variables, x: dense.apply(variables, x)[0], variables, dense.layers, _RATE)
    masked = pruned.choose(subject, "srgkp", srgkp.Config(groups=_GROUPS, search="random"))  # the times are the same
    left = compact.from_masked(net, masked.variables, masked.plan)
    sides = {"dense": (dense.apply, variables), "masked": (dense.apply, masked.variables),
             "compact": (net.apply, left)}
    sides |= {f"compact, {form}": (compact.computed_by(net, form).apply, left) for form in gathered.FORMS}
    ms = interleaved({side: functools.partial(jax.jit(apply), jax.device_put(weights), x)
                      for side, (apply, weights) in sides.items()}, (), rounds)
    full, fewer = dense.costs()["total"], net.costs()["total"]
    return [_row(f"{name}, {side}", ms[side], ms["dense"] / ms[side], 1.0 if side == "dense" else full / fewer)
            for side in sides]


def _row(what, ms, *ratios: float) -> dict[str, Any]:
    names = ("dense / this", "by MACs")
    return {"what": what, "ms": ms} | dict(zip(names, ratios or ("",) * len(names), strict=True))
