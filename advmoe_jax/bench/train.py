"""Iterations of training: AdvMoE and AT(MoE), exact and approximated, beside AT(Dense) and AT(S-Dense).

ResNet-18 at CIFAR shapes, TRADES with a PGD of two steps, batch 32. All share one device and one run; an iteration of
AdvMoE is both of its levels. Compiling is timed apart, with an empty and with a full compilation cache. MACs are those
that the algorithm asks for, each expert's images through that expert alone, whatever is computed.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core import config as configs
from advmoe_jax.core import find
from advmoe_jax.core import mesh as meshes
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Arrays
from advmoe_jax.models import macs, network
from advmoe_jax.systems import methods
from advmoe_jax.train import loop

_STEPS = 2  # of the attack of training
_BATCH, _EXAMPLES, _ITERATIONS = 32, 320, 2  # timed together, so that a router's turn comes round
_CHEAP = dict(model__router_grad="ste_selected")
_SHARED = dict(system__share_batch=True, system__share_attack=True)
_CONTENDERS = {
    "AT(Dense)": ("at_dense", {}),
    "AT(S-Dense)": ("at_sdense", {}),
    "AT(MoE), all": ("at_moe", dict(model__dispatch="all")),
    "AT(MoE), blocks": ("at_moe", dict(model__dispatch="blocks")),
    "AdvMoE, all": ("advmoe", dict(model__dispatch="all")),
    "AdvMoE, blocks": ("advmoe", dict(model__dispatch="blocks")),
    "AdvMoE, blocks, router_grad=ste_selected": ("advmoe", dict(model__dispatch="blocks", **_CHEAP)),
    "AdvMoE, blocks, share_attack": ("advmoe", dict(model__dispatch="blocks", **_SHARED)),
    "AdvMoE, blocks, router_every=2": ("advmoe", dict(model__dispatch="blocks", system__router_every=2)),
    "AdvMoE, blocks, all three": (
        "advmoe", dict(model__dispatch="blocks", system__router_every=2, **_CHEAP, **_SHARED))}


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each contender: milliseconds of an iteration, its ratio to AT(Dense), the same by MACs, seconds of
    compiling."""
    programs, compiling, counts = {}, {}, {}
    for name, (method, fields) in _CONTENDERS.items():
        programs[name], compiling[name] = _prepared(method, fields)
        counts[name] = count(method, fields)
    ms = interleaved(programs, (), rounds)
    return [{"what": name, "ms": value / _ITERATIONS, "this / AT(Dense)": value / ms["AT(Dense)"],
             "by MACs": counts[name] / counts["AT(Dense)"],
             **dict(zip(("compile s, cold", "compile s, warm"), compiling[name]))} for name, value in ms.items()]


def count(method: str, fields: dict[str, Any]) -> float:
    """MACs that an iteration of `program` asks for, for each image of its batch. A gradient to inputs or parameters
    counts as much as the forward pass."""
    cfg = _config(method, fields)
    net = network.make(cfg.model, nets.IMAGE_SHAPE, nets.CLASSES)
    of = macs.count(net)
    router, backbone = of["router"], of["pathway"]
    routed = sum(spec.macs for spec in net.layers if spec.routed)
    attack = backbone + router + _STEPS * (2 * backbone + router)  # the clean pass, and the steps
    others = (cfg.model.num_experts - 1) * routed if cfg.model.router_grad == "ste_full" else 0
    of_router, of_backbone = 2 * (2 * backbone + 3 * router + others), 2 * (3 * backbone + router)  # clean and attacked
    if cfg.system.name == "standard":
        return attack + of_backbone + 2 * (2 * router + others)
    attacks = 1 if cfg.system.share_attack else 1 + 1 / cfg.system.router_every
    return attacks * attack + of_router / cfg.system.router_every + of_backbone


def _prepared(method: str, fields: dict[str, Any]) -> tuple[Callable[[], Any], tuple[float, float]]:
    """A function that trains for a few iterations, and the seconds of its first iteration before and after caching."""
    before = {name: getattr(jax.config, name) for name in (
        "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")}
    seconds = []
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for _ in range(2):
            jax.clear_caches()
            compilation_cache.reset_cache()  # or it stays with the folder that it saw first
            run = program(method, fields)
            start = time.perf_counter()
            jax.block_until_ready(run(_ITERATIONS))
            first = time.perf_counter() - start
            start = time.perf_counter()
            jax.block_until_ready(run(_ITERATIONS))
            seconds.append(first - (time.perf_counter() - start))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    return functools.partial(run, _ITERATIONS), tuple(seconds)


def _config(method, fields):
    cfg = configs.default()
    methods.choose(cfg, method)
    fields = nets.MODEL | {name.replace("__", "."): value for name, value in fields.items()}
    cfg.update_from_flattened_dict({"data.batch_size": _BATCH, "optim.backbone.learning_rate": 0.0,
                                    "optim.router.learning_rate": 0.0, **fields})
    return cfg


def program(method: str, fields: dict[str, Any], image_shape: tuple[int, int, int] = ()) -> Callable[[int], Any]:
    """`run(iterations)`, which does all that training does on random images, but for a learning rate of 0, so that
    the load stays. `fields` of the config are written with __ for the dot."""
    cfg = _config(method, fields)
    mesh, shape = meshes.make(), image_shape or nets.IMAGE_SHAPE
    net = network.make(cfg.model, shape, nets.CLASSES, mesh)
    numbers = np.random.default_rng(0)
    images = Arrays(numbers.integers(0, 256, (_EXAMPLES, *shape), np.uint8),
                    numbers.integers(0, nets.CLASSES, _EXAMPLES).astype(np.int32))
    data = pipeline.Data(images, np.arange(_EXAMPLES), images, np.arange(0), images, nets.CLASSES, shape)
    system = find.module("systems", cfg.system.name, defines="make").make(cfg, net, data, mesh, {})
    state = system.init(jax.random.key(0))
    if net.num_experts > 1:
        state = state.replace(**nets.settled(net, state.variables))

    def run(iterations):
        nonlocal state
        for step in range(iterations):
            state, metrics = loop.iterate(system, state, step, 1, lambda stream, step=step: pipeline.device_batch(
                mesh, images, pipeline.batch_indices(system.rows, cfg.data.batch_size, 0, stream, step)))
        return metrics

    return run
