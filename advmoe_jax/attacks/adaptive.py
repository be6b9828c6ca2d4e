"""Attacks that know of the router: PGD through soft routing, on the router's scores, and on chosen experts.

Verdicts are always those of hard routing. B images, L routed choices, E experts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import driver, objectives, pgd, settings
from advmoe_jax.attacks.objectives import Objective
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import one_of
from advmoe_jax.ops import balls, losses, routing

NORMS = balls.NORMS
TAKES = "routed"  # see parse.Spec
_TEMPERATURES = (5.0, 2.0, 1.0, 0.5, 0.1)
_WEIGHTS = (0.1, 1.0, 10.0)
_PATHS = 4  # of a layer router's many


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of an adaptive attack.

    Attributes:
        mode: "soft": the experts are mixed by softmax(scores / T) while T falls from 5 to 0.1.
            "router": first the routes are changed, by raising the best other score over the chosen one's, then the loss
            is raised from there, straight through the router.
            "joint": both at once, with weights 0.1, 1 and 10 of the router's part.
            "expert": for each expert in all layers, and for the clean path with one of its four closest choices turned,
            the loss of that path is raised while the router is drawn to it.
            "transfer": the loss of each expert in all layers and of the even mixture, the router left alone.
        norm, eps, num_steps, step_size: of each run of PGD, as in pgd.Config.
        early_stop, driver: as in pgd.Config.
    """

    mode: str = "joint"
    norm: str = "linf"
    eps: str | float = "8/255"
    num_steps: int = 50
    step_size: str | float = "2.5 eps/steps"
    early_stop: bool = True
    driver: str = "auto"


def label(config: Config) -> str:
    """As tables name it: "joint-50"."""
    return f"{config.mode}-{config.num_steps}"


def make(config: Config = Config()) -> Callable[..., jax.Array]:
    """Builds `attack(outputs_fn, key, x, y) -> x_adv`.

    `outputs_fn` is `(x, route) -> (logits, aux)` with aux["router_logits"] (B, L, E) and aux["expert_ids"] (B, L).
    Images that are misclassified when clean come back as they are.

    Raises:
        UserError: a setting is out of range.
    """
    one_of("mode of adaptive", config.mode, MODES)
    eps = settings.budget("adaptive", config, NORMS, num_steps=len(_TEMPERATURES))
    units.step_size(config.step_size, eps, config.num_steps, config.norm)

    def attack(outputs_fn, key, x, y):
        outputs_fn = objectives.partial(outputs_fn, x)
        driver.count((1, 0), x.shape[0])
        worst, scores, ids = _clean(outputs_fn, x, y)
        rows = dict(keys=rng.rowwise(key, x.shape[0]), x=x, y=dict(label=y, clean=ids), scores=scores)
        runs = _RUNS[config.mode](*scores.shape[1:])

        def one(inputs, number):
            found, steps = None, max(round(config.num_steps / len(runs[number])), 1)
            step_size = units.step_size(config.step_size, eps, steps, config.norm)
            for phase in runs[number]:
                rows = dict(inputs.rows)
                scores = rows.pop("scores")
                if phase.route is not None:
                    rows["route"] = phase.route(scores, rows["y"]["clean"])
                rows["y"] |= dict(target=rows.get("route", rows["y"]["clean"]),
                                  weight=jnp.full(scores.shape[0], phase.weight, x.dtype))
                if found is not None:
                    rows["init"] = found["x"]
                program = pgd.Search(config.norm, "uniform", phase.objective, True, config.early_stop,
                                     cost=(phase.passes, 1))
                scalars = inputs.scalars | dict(restart=number, step_size=jnp.asarray(step_size, x.dtype))
                found = driver.run(program, driver.Inputs(phase.model(outputs_fn), rows, scalars), steps + 1,
                                   config.driver)
            return found

        inputs = driver.Inputs(outputs_fn, rows, dict(eps=jnp.asarray(eps, x.dtype)))
        return jax.lax.stop_gradient(driver.rounds(one, inputs, worst, len(runs), stops=True)["x"])

    return attack


@jax.jit
def _clean(outputs_fn, x, y):
    """A candidate that is broken where the image is misclassified already, scores (B, L, E) and choices (B, L)."""
    logits, aux = outputs_fn(x, routing.hard())
    return driver.none_yet(x, objectives.misclassified(logits, y)), aux["router_logits"], aux["expert_ids"]


# What is attacked, and what users get: models x -> ((logits, aux), (logits, aux)).


def _straight(outputs_fn, x):
    """Hard routing with the straight-through gradient of all experts."""
    outputs = outputs_fn(x, routing.hard("ste_full"))
    return outputs, outputs


def _constant(outputs_fn, x):
    """Hard routing, the choice being a constant."""
    outputs = outputs_fn(x, routing.hard())
    return outputs, outputs


def _mixed(outputs_fn, temperature, x):
    return outputs_fn(x, routing.soft(temperature)), outputs_fn(x, routing.hard())


def _fixed(outputs_fn, x, route):
    return outputs_fn(x, routing.fixed(route)), outputs_fn(x, routing.hard())


# What is raised. y is {"label": (B,), "clean" and "target": (B, L), "weight": (B,)}.


def _task(outputs, y):
    return losses.cross_entropy(outputs[0][0], y["label"])


def _other_choice(outputs, y):
    """How far the best other score is above that of the clean choice, mean over the layers."""
    scores = outputs[0][1]["router_logits"]
    flat = losses.margin(scores.reshape(-1, scores.shape[-1]), y["clean"].reshape(-1))
    return jnp.mean(flat.reshape(scores.shape[:2]), -1)


def _both(outputs, y):
    return _task(outputs, y) + y["weight"] * _other_choice(outputs, y)


def _on_path(outputs, y):
    """The loss on the path, less what the router's scores still lack to choose it."""
    scores = outputs[0][1]["router_logits"]
    wanted = jnp.take_along_axis(scores, y["target"][..., None], -1)[..., 0]
    return _task(outputs, y) - y["weight"] * jnp.mean(jnp.max(scores, -1) - wanted, -1)


def _succeeds(outputs, y):
    return objectives.misclassified(outputs[1][0], y["label"])


_TASK, _OTHER, _BOTH, _ON_PATH = (Objective(loss, _succeeds) for loss in (_task, _other_choice, _both, _on_path))


@dataclasses.dataclass(frozen=True)
class _Phase:
    """A part of a run: what is attacked, what is raised, routes by (scores, clean choices) -> (B, L), a weight, and
    the forward passes of a look: two where users get something else than what is attacked."""

    model: Callable[[Any], jax.tree_util.Partial]
    objective: Objective
    route: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    weight: float = 0.0
    passes: int = 1


def _of(function, *more):
    return lambda outputs_fn: jax.tree_util.Partial(function, outputs_fn, *more)


def _everywhere(expert):
    return lambda scores, clean: jnp.full_like(clean, expert)


def _turned(rank):
    """The clean path, but for the layer whose choice was the rank-th closest, which takes its second best expert."""
    def route(scores, clean):
        best, second = jnp.moveaxis(jax.lax.top_k(scores, 2)[0], -1, 0)
        layer = jnp.argsort(best - second, -1)[:, rank]
        other = jax.lax.top_k(scores, 2)[1][..., 1]
        return jnp.where(jnp.arange(clean.shape[1])[None] == layer[:, None], other, clean)

    return route


def _soft_runs(layers, experts):
    return [[_Phase(_of(_mixed, jnp.float32(t)), _TASK, passes=2) for t in _TEMPERATURES]]


def _router_runs(layers, experts):
    return [[_Phase(_of(_constant), _OTHER), _Phase(_of(_straight), _TASK)]]


def _joint_runs(layers, experts):
    return [[_Phase(_of(_straight), _BOTH, weight=weight)] for weight in _WEIGHTS]


def _expert_runs(layers, experts):
    turned = min(_PATHS, layers) if layers > 1 else 0
    routes = [*map(_everywhere, range(experts)), *map(_turned, range(turned))]
    return [[_Phase(_of(_fixed), _ON_PATH, route, weight=1.0, passes=2)] for route in routes]


def _transfer_runs(layers, experts):
    even = _Phase(_of(_mixed, jnp.float32(1e3)), _TASK, passes=2)
    return [[_Phase(_of(_fixed), _TASK, _everywhere(e), passes=2)] for e in range(experts)] + [[even]]


_RUNS = {"soft": _soft_runs, "router": _router_runs, "joint": _joint_runs, "expert": _expert_runs,
         "transfer": _transfer_runs}
MODES = tuple(_RUNS)
