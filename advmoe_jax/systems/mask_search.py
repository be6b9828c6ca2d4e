"""Searches which weights of a finished run to keep: scores are trained by the ordinary losses, and the weights rest.

HYDRA (Sehwag et al., NeurIPS 2020): a weight's score begins as its size, or as another score of the pruning room; the
largest stay, and gradients pass the choice as if a mask were its scores. HARP (Zhao & Wressnegger, ICLR 2023) learns
each layer's share as well.

The state's parameters are always the masked ones, which attacks, evaluations and other runs read. What is dense rests
in `State.extra` with the scores. Norms and biases rest too; running statistics follow the masked network, as in HARP's
code: loss passes run in train mode. A run with system.method=given then trains what is left.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core import find, shares
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.ops import masks as masking
from advmoe_jax.pruning import masks as selecting
from advmoe_jax.pruning import pruned, search, streams
from advmoe_jax.pruning.search import Search
from advmoe_jax.pruning.subject import KERNELS
from advmoe_jax.systems import adversarial
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.prune import is_rate, logits_of, own_config, score_images
from advmoe_jax.systems.sources import Source, initial, needed
from advmoe_jax.train.state import Part, State
from advmoe_jax.train.step import Objective
from advmoe_jax.train.system import Inputs, System

NAME = "search"  # of what it owns in State.extra
ROOM = ("pruning", "score")  # modules that score single weights
_LEARNS = Only("system.learn_rates=true", lambda config: config.system.get("learn_rates"))
_FILTERS = Only("system.unit=filter", lambda config: config.system.get("unit") == "filter")
_NEEDS_IMAGES = Only("a system.score that reads gradients", lambda config: _scorer(config).ABOUT.needs_images)


def _scorer(config):
    return find.module(ROOM[0], config.system.score, defines=ROOM[1:], kind="system.score")


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    rate: str = setting("9/10", "share of the weights of the layers in system.kernels that goes", read=is_rate)
    kernels: str = setting("every", "those layers: convolutions in blocks, or every convolution and, where single "
                                    "weights go, linear layer", choices=KERNELS)
    skip: str = setting("(^|/)router/", "regular expression; layers whose path has a match stay whole")
    unit: str = setting("weight", f"what goes: {', '.join(selecting.UNITS)}", read=selecting.check_unit)
    coupled: bool = setting(False, "layers whose outputs are added lose the same filters, all with the weights that "
                                   "read them: a narrower dense network is left", only=_FILTERS)
    scope: str = setting("layer", "the same share of each layer, or of all together", choices=("layer", "global"))
    score: str = setting("erm", "what the scores begin as, a module of advmoe_jax.pruning", room=ROOM)
    images: int = setting(256, "training images, attacked by the first of train.attack, that they are made of", least=1,
                          most=10**6, only=_NEEDS_IMAGES)
    learn_rates: bool = setting(False, "whether each layer learns its own share (HARP)")
    budget_weight: float = setting(0.01, "weight of HARP's loss for a share of all above the budget, of the first "
                                         "epoch; that of epoch n is n times as large", least=0, most=1e6, only=_LEARNS)


def check(config) -> None:
    """Raises UserError for a run that has nothing to search in, or asks for what excludes each other."""
    needed(config)
    check_search(config)


def check_search(config) -> None:
    """`check` but for what it starts from."""
    system = config.system
    if config.train.ema:
        raise UserError(f"train.ema is {config.train.ema}: expected 0 with system.name={system.name}, whose weights "
                        "rest")
    if system.unit.startswith("grouped") and system.scope == "global":
        raise UserError(f"system.scope is 'global': expected 'layer' with system.unit={system.unit}, whose groups keep "
                        "equally many")
    if system.learn_rates and (system.scope != "layer" or system.unit.startswith("grouped") or system.coupled):
        raise UserError(f"system.learn_rates is true with system.scope={system.scope}, system.unit={system.unit}, "
                        f"system.coupled={str(system.coupled).lower()}: expected scope layer, a unit other than "
                        "grouped, and coupled false")


def make(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    system = cfg.system
    for name, source in sources.items():
        if jax.tree.leaves(source.masks):
            raise UserError(f"init_from names {name}, which is pruned already: expected a dense run to search in")
    _, layers = pruned.layers_of_rate(model.layers, system.kernels, system.skip, system.unit)
    if system.coupled and not streams.streams(model.layers, {spec.path for spec in layers}):
        raise UserError(f"system.coupled is true, and no channel of the {model.kind} network can go whole: expected "
                        "one without experts, and kernels and skip that leave all writers of some channels")
    how = search.Search(model.layers, layers, 1 - shares.share(system.rate), system.unit, system.scope,
                        system.learn_rates, system.coupled)
    groups = tuple(group for group in model.groups if any(spec.path.startswith(f"{group}/") for spec in layers))
    method, scores = "HARP" if system.learn_rates else "HYDRA", _scores_at_first(cfg, model, data, sources)
    started = jax.jit(lambda state, scores: _applied(_with(state, search.begin(state.params, how, scores)), how))
    built = build(
        cfg, model, data, mesh, sources, (Update("train", groups, Inputs("data", "train", "train")),),
        f"masks of {model.kind} searched by {method} at {system.rate}"
        f"{'' if system.score == 'erm' else f' from {system.score}'}, {system.loss}",
        objective=functools.partial(_objective, how, pipeline.steps_per_epoch(len(data.rows), cfg.data.batch_size)),
        after=lambda state: _applied(state, how), part=_scores(groups, how),
        begin=lambda state: started(state, scores))
    if not system.learn_rates:
        return built

    def last(state):
        return _applied(_with(state, search.within_budget(state.extra[NAME], how)), how)

    return dataclasses.replace(built, every={"100%": jax.jit(last, donate_argnums=0)}, first_best=built.length)


def _scores_at_first(cfg, model: Model, data: pipeline.Data, sources: Mapping[str, Source]) -> dict[str, Any] | None:
    """{path of a kernel: score}; None: the weights themselves, or nothing is to be trained."""
    if not sources or cfg.system.score == "erm":
        return None
    system, module, (variables, _) = cfg.system, _scorer(cfg), initial(model, sources)
    x, y = score_images(cfg, model, data, variables, "attacked") if module.ABOUT.needs_images else (None, None)
    subject = pruned.of(logits_of(model), variables, model.layers, system.rate, system.kernels, system.skip, x, y)
    return {f"{path}/kernel": score for path, score in module.score(subject, own_config(module, system)).items()}


def _with(state: State, found: Mapping[str, Any]) -> State:
    return state.replace(extra={**state.extra, NAME: dict(found)})


def _applied(state: State, how: Search) -> State:
    """The state with the masks of its scores, and its parameters masked by them."""
    found = state.extra[NAME]
    masks = jax.tree.map(lambda mask: mask != 0, search.soft_masks(found, how))
    params = jax.tree.map(jnp.copy, found["dense"])  # the state is donated, so no buffer may be in it twice
    return state.replace(params=masking.apply(params, masks), masks={
        group: part for group, part in masks.items() if jax.tree.leaves(part)})


def _scores(groups: tuple[str, ...], how: Search) -> Part:
    """Scores and rates as what is trained."""
    names = ("scores", "rates") if how.learns_rates else ("scores",)

    def get(state):
        return {group: {name: state.extra[NAME][name][group] for name in names} for group in groups}

    def put(state, trees):
        return _with(state, state.extra[NAME] | {
            name: state.extra[NAME][name] | {group: of[name] for group, of in trees.items()} for name in names})

    return Part(get, put)


def _objective(how: Search, per_epoch: int, model: Model, cfg, **kind: Any) -> Objective:
    """The ordinary loss of the masked network as a function of the scores, and the budget's of the rates."""
    ordinary = adversarial.objective(model, cfg, **kind)

    def run(state, batch):
        found = state.extra[NAME]
        params = masking.map_masked(lambda leaf, mask: leaf * mask, found["dense"], search.soft_masks(found, how))
        loss, (stats, metrics) = ordinary(state.replace(params=params), batch)
        if how.learns_rates:
            epoch = state.step // per_epoch + 1
            loss += cfg.system.budget_weight * epoch * search.budget_loss(found, how)
            metrics |= {"kept": search.kept(found, how)}
        return loss, (stats, metrics)

    return run
