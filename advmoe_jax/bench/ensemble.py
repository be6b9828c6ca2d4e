"""A team at inference: all members, those that are asked while images leave the batch, and one dense network.

Four ResNet-18 with random weights on a batch of 256. The gate opens at a quantile of the first member's confidence, so
that a given share of the images stops there; how many members are asked is measured. Masks of single weights save no
time here, so that a member takes as long as the dense network.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core import config as configs
from advmoe_jax.models import model as models
from advmoe_jax.ops.stopping import Rule

_MEMBERS, _BATCH, _SHARES = 4, 256, (1.0, 0.9, 0.5, 0.0)


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for all members and for the dense network, and for each share of images that stop at the first member:
    milliseconds, the mean number of members asked, the time over that of all members, and what it would be by members
    asked alone."""
    config = configs.default(model="team")
    fields = nets.MODEL | {"model.num_members": _MEMBERS, "model.num_experts": 1, "model.model_scale": 1.0}
    config.update_from_flattened_dict({k: v for k, v in fields.items() if k != "model.router_width"})
    team = models.make(config.model, nets.IMAGE_SHAPE, nets.CLASSES)
    variables, x = jax.jit(team.init)(jax.random.key(0)), nets.images(_BATCH)
    call = jax.jit(lambda function, x: function(x)[0])
    logits = jax.jit(lambda function, x: function(x)[1]["member_logits"])(team.outputs_fn(variables), x)
    confidence = np.square(np.max(np.asarray(jax.nn.softmax(logits[:, 0])), -1))
    sides = {"all members": lambda x, function=team.outputs_fn(variables): call(function, x),
             "one dense network": lambda x, function=team.member.outputs_fn(team.members(variables)[0]): call(
                 function, x)}
    asked = {"all members": float(_MEMBERS), "one dense network": 1.0}
    for share in _SHARES:
        least = float(np.quantile(confidence, 1 - share)) if share < 1 else 0.0
        rule = Rule("thresholds", most_change=1e6, least_confidence=least)
        function = dataclasses.replace(team, rule=rule, is_sequential=True).outputs_fn(variables)
        name = f"asked in turn, {share:.0%} stop at once"
        sides[name] = lambda x, function=function: function(x)[0]
        asked[name] = float(np.mean(function(x)[1]["members_asked"]))
    ms = interleaved(sides, (x,), rounds)
    return [{"what": name, "ms": ms[name], "members asked": asked[name], "time / all": ms[name] / ms["all members"],
             "asked / all": asked[name] / _MEMBERS} for name in sides]
