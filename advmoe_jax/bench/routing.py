"""Inference of routed networks beside the dense one, and beside the least that it could be: a router and S-Dense.

ResNet-18 at CIFAR shapes with random weights. Choices are given: each expert gets as many images as the others, or the
first gets 90 % of them, or, with the folder of a run, each has the share that it had at its end. The router always
counts. "By blocks" and "by host" are values of `model.dispatch`.
"""

import functools
from pathlib import Path
from typing import Any

import jax

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import macs
from advmoe_jax.ops import routing

_TWO, _FOUR = dict(num_experts=2, model_scale=0.5), dict(num_experts=4, model_scale=0.25)
_CASES = (  # what, fields of the model, B
    ("one choice, ResNet-20 router", dict(routing="global", **_TWO), 64),
    ("one choice, ResNet-20 router of width 4", dict(routing="global", router_width=4, **_TWO), 64),
    ("one choice, ResNet-20 router", dict(routing="global", **_FOUR), 128),
    ("one choice, ResNet-20 router of width 4", dict(routing="global", router_width=4, **_FOUR), 128),
    ("a choice per layer, layer router", dict(routing="layer", **_TWO), 64),
    ("a choice per layer, embedding router", dict(routing="embedding", **_TWO), 64))


def measure(rounds: int, workdir: Path | None = None) -> list[dict[str, Any]]:
    """A row for each case and load: milliseconds of every way to compute, ratios, and the ratio of MACs.

    Args:
        rounds: timings of each.
        workdir: of a run, whose loads are added to the cases that have as many experts and choices.
    """
    trained = None if workdir is None else nets.trained(workdir)
    if trained is not None and not any(_fits(trained, nets.design(**model)) for _, model, _ in _CASES):
        raise UserError(f"--workdir is {workdir}, a run with choices and experts {trained.shape}: expected those of "
                        "a case, such as of a ResNet-18 with a router in each layer and two experts")
    return [row for case in _CASES for row in _rows(*case, rounds, trained)]


def _fits(trained, net):
    return trained.shape == (nets.num_choices(net), net.num_experts)


def _rows(what, model, batch, rounds, trained):
    x, num_experts = nets.images(batch), model["num_experts"]
    dense, s_dense = (nets.make(num_experts=1, model_scale=scale) for scale in (1.0, model["model_scale"]))
    kinds = ("all", "blocks", "host") if model["routing"] == "global" else ("all", "blocks")
    routed = {kind: nets.make(**model, dispatch=kind) for kind in kinds}
    net, variables = routed["all"]
    alone = {"dense": _forward(*dense), "S-Dense": _forward(*s_dense)}
    if model["routing"] != "layer":
        alone["router"] = functools.partial(jax.jit(functools.partial(net.module.apply, method="scores")), variables)
    rows = []
    loads = {f"{100 * first:.0f} %": nets.first_takes(first, num_experts) for first in (1 / num_experts, 0.9)}
    if trained is not None and _fits(trained, net):
        loads[f"trained, {100 * trained[:, 0].min():.0f} to {100 * trained[:, 0].max():.0f} %"] = trained
    for load, shares in loads.items():
        route = nets.route(net, batch, shares)
        ms = interleaved(alone | {kind: _forward(*of, route) for kind, of in routed.items()}, (x,), rounds)
        auto = nets.design(**model).module.dispatch.kind
        least = ms["S-Dense"] + ms.get("router", 0)
        counts = [macs.count(of)["total"] for of in (dense[0], net)]
        rows.append({
            "what": what, "N": num_experts, "B": batch, "load of the first": load,
            "dense ms": ms["dense"], "S-Dense ms": ms["S-Dense"], "router ms": ms.get("router", ""),
            "all ms": ms["all"], "blocks ms": ms["blocks"], "host ms": ms.get("host", ""),
            "auto is": auto, "dense / auto": ms["dense"] / ms[auto],
            "by MACs": counts[0] / counts[1], "all / blocks": ms["all"] / ms["blocks"],
            "auto / (router + S-Dense)": ms[auto] / least})
    return rows


def _forward(net, variables, route=routing.hard()):
    """x -> (logits, aux), compiled; the host sorts before it calls what is."""
    apply = net.apply if net.module.dispatch.kind == "host" else jax.jit(net.apply)
    return lambda x: apply(variables, x, route)
