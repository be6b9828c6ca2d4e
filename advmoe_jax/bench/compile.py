"""What compiling a training iteration of WRN-28-10 takes, and the memory that XLA plans for it, at batch 128.

Nothing is trained: programs are compiled for arrays that have shapes alone. TRADES with a PGD of two steps; `attack`
makes a batch ready, the others are updates. A program holds its arguments (state and batch), its results where they
take no argument's place, and temporaries; the largest of an iteration's programs is its peak. What an update's forward
pass keeps for its gradient, weights included, does not depend on the compiler. CPU seconds are of all threads: on idle
cores the clock shows less.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from advmoe_jax.core import config as configs
from advmoe_jax.core import find
from advmoe_jax.core import mesh as meshes
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Arrays
from advmoe_jax.models import network
from advmoe_jax.systems import adversarial, methods
from advmoe_jax.train import loop

_SHAPE, _CLASSES, _BATCH = (32, 32, 3), 10, 128
_MODEL = {"model.depth": 28, "model.width": 160}
_SMALL = {"train.precision": "bfloat16", "train.remat": True}
_CASES = {"AT(Dense)": ("at_dense", {}), "AT(Dense), bfloat16, remat": ("at_dense", _SMALL),
          "AdvMoE, bfloat16, remat": ("advmoe", _SMALL)}


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each program of each case: seconds of tracing and compiling, and GiB. `rounds` is not used, as nothing
    that is timed is run twice."""
    del rounds
    with _nothing_cached():
        return [{"what": name, "program": program, **_compiled(lower), "GiB kept": kept() / 2**30}
                for name, (method, fields) in _CASES.items() for program, lower, kept in _programs(method, fields)]


@contextlib.contextmanager
def _nothing_cached() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    _use_cache(False)
    try:
        yield
    finally:
        _use_cache(before)


def _use_cache(is_on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", is_on)
    compilation_cache.reset_cache()  # or it stays as it was when the first program was compiled


def _programs(method: str, fields: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any], Callable[[], int]]]:
    """(name, () -> lowered, () -> bytes that the forward pass of the loss keeps) of the attack, and of each update."""
    cfg = configs.default(model="wide_resnet")
    methods.choose(cfg, method)
    cfg.update_from_flattened_dict(_MODEL | fields | {"data.batch_size": _BATCH})
    mesh, images = meshes.make(), Arrays(np.zeros((_BATCH, *_SHAPE), np.uint8), np.zeros(_BATCH, np.int32))
    net = network.make(cfg.model, _SHAPE, _CLASSES, mesh)
    data = pipeline.Data(images, np.arange(_BATCH), images, np.arange(0), images, _CLASSES, _SHAPE)
    system = find.module("systems", cfg.system.name, defines="make").make(cfg, net, data, mesh, {})
    state, by_example = loop.abstract_state(system, mesh), meshes.by_example(mesh)
    batch = {name: jax.ShapeDtypeStruct((_BATCH, *shape), kind, sharding=by_example) for name, shape, kind in (
        ("image", _SHAPE, np.uint8), ("label", (), np.int32), ("index", (), np.int32))}
    first = system.steps[0]

    def attack(state, batch):
        return first.prepare(state, batch, first.inputs)

    ready = jax.tree.map(lambda of: jax.ShapeDtypeStruct(of.shape, of.dtype, sharding=by_example),
                         jax.eval_shape(attack, state, batch))
    def kept(step):
        loss = adversarial.objective(net.in_training(cfg.train), cfg, router_loss=step.name == "lower")

        def forward(owned, state, batch):
            return jax.vjp(lambda owned: loss(state.replace(params=state.params | owned), batch)[0], owned)[1]

        owned = {group: state.params[group] for group in step.owns}
        return sum(of.size * of.dtype.itemsize for of in jax.tree.leaves(jax.eval_shape(forward, owned, state, ready)))

    yield "attack", lambda: jax.jit(attack).lower(state, batch), lambda: 0
    for step in system.steps:
        yield step.name, lambda step=step: step.update.lower(state, ready), lambda step=step: kept(step)


def _compiled(lower: Callable[[], Any]) -> dict[str, float]:
    times = [_clocks()]
    lowered = lower()
    times.append(_clocks())
    found = lowered.compile().memory_analysis()
    times.append(_clocks())
    (tracing, _), (compiling, of_cpu) = np.diff(times, axis=0)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    held = found.argument_size_in_bytes + results + found.temp_size_in_bytes
    return {"tracing s": float(tracing), "compiling s": float(compiling), "CPU s of compiling": float(of_cpu),
            "GiB of temporaries": found.temp_size_in_bytes / 2**30, "GiB in all": held / 2**30}


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
