"""How time and memory of inference grow with the batch, and with the number of experts that share a network.

ResNet-18 at CIFAR shapes with random weights and a router in every layer; each expert gets as many images as the
others. Over the batch N = 2, r = 0.5; over the experts r = 1 / N. Memory is what XLA plans for temporaries.
"""

import functools
from typing import Any

import jax
import numpy as np

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.models import macs

_BATCHES, _EXPERTS, _BATCH = (8, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16), 128
_KINDS = ("dense", "S-Dense", "all", "blocks")


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each batch and each number of experts: milliseconds, and MiB of temporaries."""
    return [*(_row("batch", 2, batch, rounds) for batch in _BATCHES),
            *(_row("experts", num_experts, _BATCH, rounds) for num_experts in _EXPERTS)]


def draw(rows: list[dict[str, Any]]) -> Any:
    """A matplotlib figure: time over the batch, time over the number of experts, memory over the batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = (("batch", "B", "ms", "ms"), ("experts", "N", "ms", "ms"), ("batch", "B", "MiB", "MiB of temporaries"))
    for axes, (growing, x, unit, label) in zip(figure.subplots(1, len(panels)), panels):
        found = [row for row in rows if row["growing"] == growing]
        for kind in _KINDS:
            axes.plot([row[x] for row in found], [row[f"{kind} {unit}"] for row in found], "o-", label=kind)
        axes.set(xscale="log", yscale="log", xlabel=f"{growing} ({x})", ylabel=label, xticks=[row[x] for row in found],
                 xticklabels=[row[x] for row in found])
        axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def _row(growing, num_experts, batch, rounds):
    scale = 1 / num_experts
    x = nets.images(batch)
    of = {"dense": dict(num_experts=1, model_scale=1.0), "S-Dense": dict(num_experts=1, model_scale=scale)}
    of |= {kind: dict(num_experts=num_experts, model_scale=scale, routing="layer", dispatch=kind)
           for kind in ("all", "blocks")}
    compiled, runs, counts = {}, {}, {}
    for kind, model in of.items():
        net, variables = nets.make(**model)
        counts[kind] = macs.count(net)["total"]
        route = nets.route(net, batch, np.full(num_experts, 1 / num_experts))
        compiled[kind] = jax.jit(net.apply).lower(variables, x, route).compile()
        runs[kind] = functools.partial(compiled[kind], variables, x, route)
    ms = interleaved(runs, (), rounds)
    memory = {kind: program.memory_analysis().temp_size_in_bytes / 2**20 for kind, program in compiled.items()}
    return {"growing": growing, "N": num_experts, "B": batch, **{f"{kind} ms": ms[kind] for kind in of},
            **{f"{kind} MiB": memory[kind] for kind in of}, "dense / blocks": ms["dense"] / ms["blocks"],
            "by MACs": counts["dense"] / counts["blocks"]}
