"""Attacks that know of the router: PGD through soft routing, on the router's scores, and on chosen experts.

Verdicts are always those of hard routing. B images, L routed choices, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives, settings, structured
from advmoe_jax.attacks.about import About
from advmoe_jax.attacks.objectives import Objective
from advmoe_jax.core.errors import one_of
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls, losses, routing

ABOUT = About(balls.NORMS, takes="routed", needs=("router_logits", "expert_ids"))
_TEMPERATURES = (5.0, 2.0, 1.0, 0.5, 0.1)
_WEIGHTS = (0.1, 1.0, 10.0)
_PATHS = 4  # of a layer router's many


@dataclasses.dataclass(frozen=True)
class Config(structured.Settings):
    """Settings of an adaptive attack.

    Attributes:
        mode: "soft": the experts are mixed by softmax(scores / T) while T falls from 5 to 0.1.
            "router": first the routes are changed: the best other score is raised above that of the chosen expert. From
            there the loss is raised, by straight-through gradients of the router.
            "joint": both at once, with weights 0.1, 1 and 10 of the router's part.
            "expert": for each expert, taken in all layers, and for the clean path with one of its four closest choices
            changed: the loss of that path is raised, and the scores are moved so that the router takes it.
            "transfer": the loss of each expert, taken in all layers, and of the even mixture; the router has no part.
        others: see structured.Settings.
    """

    mode: str = setting("joint", "of the router or of the experts", read=lambda mode, what: one_of(what, mode, MODES))
    num_steps: int = settings.count(50, "gradient steps, shared by the phases of a run", least=len(_TEMPERATURES))


label = structured.label


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(outputs_fn, key, x, y) -> x_adv`; errors as pgd.make.

    `outputs_fn` is `(x, route) -> (logits, aux)` with aux["router_logits"] (B, L, E) and aux["expert_ids"] (B, L).
    Images that are misclassified when clean come back as they are.
    """
    def begin(inputs):
        rows = inputs.rows
        driver.count((1, 0), rows["x"].shape[0])
        worst, scores, ids = _clean(inputs.logits_fn, rows["x"], rows["y"])
        rows = rows | dict(y=dict(label=rows["y"], clean=ids), scores=scores)
        return inputs._replace(rows=rows), worst, _RUNS[config.mode](*scores.shape[1:])

    return structured.attack_by("adaptive", config, ABOUT, begin, stops=True)


@jax.jit
def _clean(outputs_fn, x, y):
    """The clean images as a candidate, scores (B, L, E) and choices (B, L)."""
    logits, aux = outputs_fn(x, routing.hard())
    return driver.none_yet(x, objectives.misclassified(logits, y)), *structured.needed("adaptive", ABOUT, aux)


# Models x -> (outputs that are attacked, outputs that users get); outputs are (logits, aux).


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
    return routing.other_choice(outputs[0][1]["router_logits"], y["clean"])


def _both(outputs, y):
    return _task(outputs, y) + y["weight"] * _other_choice(outputs, y)


def _on_path(outputs, y):
    """The loss on the path, minus how far its scores are below the best ones."""
    scores = outputs[0][1]["router_logits"]
    wanted = jnp.take_along_axis(scores, y["target"][..., None], -1)[..., 0]
    return _task(outputs, y) - y["weight"] * jnp.mean(jnp.max(scores, -1) - wanted, -1)


def _succeeds(outputs, y):
    return objectives.misclassified(outputs[1][0], y["label"])


_TASK, _OTHER, _BOTH, _ON_PATH = (Objective(loss, _succeeds) for loss in (_task, _other_choice, _both, _on_path))


def _phase(function, objective, *more, route=None, weight=0.0):
    """A phase that attacks one of the models above, on a route (scores, clean choices) -> (B, L) if there is one."""
    def search_rows(rows):
        rows, scores, y = dict(rows), rows["scores"], rows["y"]
        del rows["scores"]
        if route is not None:
            rows["route"] = route(scores, y["clean"])
        weights = jnp.full(scores.shape[0], weight, rows["x"].dtype)
        return rows | {"y": y | dict(target=rows.get("route", y["clean"]), weight=weights)}

    def model(outputs_fn):
        return jax.tree_util.Partial(function, outputs_fn, *more)

    return structured.Phase(objective, search_rows, model, passes=2 if function in (_mixed, _fixed) else 1)


def _everywhere(expert):
    return lambda scores, clean: jnp.full_like(clean, expert)


def _changed(rank):
    """The clean path, but the layer with the rank-th closest choice takes its second best expert."""
    def route(scores, clean):
        (best, second), (_, other) = (jnp.moveaxis(part, -1, 0) for part in jax.lax.top_k(scores, 2))
        layer = jnp.argsort(best - second, -1)[:, rank]
        return jnp.where(jnp.arange(clean.shape[1])[None] == layer[:, None], other, clean)

    return route


def _paths(layers, experts):
    changed = min(_PATHS, layers) if layers > 1 else 0
    return [*map(_everywhere, range(experts)), *map(_changed, range(changed))]


_RUNS = {
    "soft": lambda layers, experts: [[_phase(_mixed, _TASK, jnp.float32(t)) for t in _TEMPERATURES]],
    "router": lambda layers, experts: [[_phase(_constant, _OTHER), _phase(_straight, _TASK)]],
    "joint": lambda layers, experts: [[_phase(_straight, _BOTH, weight=weight)] for weight in _WEIGHTS],
    "expert": lambda layers, experts: [[_phase(_fixed, _ON_PATH, route=route, weight=1.0)]
                                       for route in _paths(layers, experts)],
    "transfer": lambda layers, experts: [*([_phase(_fixed, _TASK, route=_everywhere(e))] for e in range(experts)),
                                         [_phase(_mixed, _TASK, jnp.float32(1e3))]]}
"""The runs of each mode, by numbers of layers and experts."""
MODES = tuple(_RUNS)
