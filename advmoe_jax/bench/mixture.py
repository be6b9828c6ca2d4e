"""Serving experts behind a gate: all of them, or the best one or two of each image, and what that saves.

ResNet-18 at CIFAR shapes with random weights, gate and experts alike; the biases of the gate spread a batch over the
experts.
"""

import functools
from typing import Any

import jax
import numpy as np

from advmoe_jax.bench import nets
from advmoe_jax.bench.timing import interleaved
from advmoe_jax.core import config as configs
from advmoe_jax.models import mixture
from advmoe_jax.models.mixture import Mixture

_CASES = ((4, 64), (4, 128))
"""Experts and images."""


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each way to serve: milliseconds, and the time over that of the gate and one expert for every image."""
    return [row for members, batch in _CASES for row in _case(members, batch, rounds)]


def _model(members: int, serve: str) -> Mixture:
    config = configs.default(model="mixture")
    config.update_from_flattened_dict(nets.MODEL | {"model.num_experts": 1, "model.model_scale": 1.0,
                                                    "model.num_members": members, "model.serve": serve})
    return mixture.model(config.model, nets.IMAGE_SHAPE, nets.CLASSES)


def _case(members: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    whole, x = _model(members, "all"), nets.images(batch)
    variables = _spread(whole, jax.device_get(jax.jit(whole.init)(jax.random.key(0))), x)
    load = np.bincount(np.argmax(_scores(whole, variables, x), 1), minlength=members)
    variables = jax.device_put(variables)
    first = {part: trees["expert0"] for part, trees in variables.items()}
    gate = {part: trees["gate"] for part, trees in variables.items()}

    def both(gate, first, x):
        return whole.gate.apply(gate, x)[0], whole.experts[0].apply(first, x)[0]

    sides = {"gate and one expert": functools.partial(jax.jit(both), gate, first, x)}
    for serve in ("top-1", "top-2", "all"):
        served = _model(members, serve)
        logits = jax.jit(lambda variables, x, served=served: served.outputs_fn(variables)(x)[0])
        sides[serve] = functools.partial(logits, variables, x)
    ms = interleaved(sides, (), rounds)
    base = ms["gate and one expert"]
    return [{"what": side, "M": members, "B": batch, "load": "-".join(map(str, load)), "ms": ms[side],
             "this / (gate + one expert)": ms[side] / base} for side in sides]


def _scores(model: Mixture, variables: Any, x: jax.Array) -> np.ndarray:
    return np.asarray(jax.jit(lambda variables, x: model.outputs_fn(variables)(x)[1]["gate_logits"])(variables, x))


def _spread(model: Mixture, variables: Any, x: jax.Array) -> Any:
    """Variables whose gate has no favourite on these images."""
    linear = variables["params"]["gate"]["backbone"]["linear"]
    linear["kernel"] = linear["kernel"] * 1e3
    linear["bias"] = -_scores(model, variables, x).mean(0)
    return variables
