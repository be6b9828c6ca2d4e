"""Training on attacked images, as one update or several: the loss, its metrics, the system.

x images (B, H, W, C) in [0, 1], y labels (B,), P passes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree, units, xla
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.data import pipeline
from advmoe_jax.models.model import Model
from advmoe_jax.models.network import HAS_ROUTER
from advmoe_jax.ops import augment, losses, routing
from advmoe_jax.systems import adversary
from advmoe_jax.systems.sources import Source, initial
from advmoe_jax.train import awp, ema, optim, step
from advmoe_jax.train import state as states
from advmoe_jax.train.state import Part, State
from advmoe_jax.train.system import Batch, Inputs, System

LOSSES = ("natural", "madry", "trades", "mart")
_PERTURBED = Only("system.awp above 0", lambda config: config.system.awp > 0)
_WEIGHTED = Only("system.loss trades or mart, or system.router_loss label_mod", lambda config: (
    config.system.loss in ("trades", "mart") or config.system.get("router_loss") == "label_mod"))


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` that these systems share."""

    loss: str = setting("trades", "what is trained", choices=LOSSES)
    beta: float = setting(6.0, "1 / lambda, the weight of the robust term", least=0, most=1e6, only=_WEIGHTED)
    balance_loss: float = setting(0.0, "weight of the Switch Transformer's load-balance loss", least=0, most=1e6,
                                  only=HAS_ROUTER)
    label_smoothing: float = setting(0.0, "share of a label that all classes get alike", least=0, most=1)
    mixup: float = setting(0.0, "alpha: images are mixed with others by shares from Beta(alpha, alpha), the labels in "
                                "the loss too; attacks know the image's own; 0: they are not", least=0, most=1e3)
    cutmix: float = setting(0.0, "alpha: each image gets a rectangle of another, of 1 - Beta(alpha, alpha) of its area "
                                 "before borders cut it; labels and attacks as with mixup; 0: none", least=0,
                            most=1e3, only=Only("system.mixup 0", lambda config: not config.system.mixup))
    awp: float = setting(0.0, "gamma of adversarial weight perturbation, a share of each kernel's norm; .005 to .01 "
                              "are usual, 0: none", least=0, most=1)
    awp_from: str = setting("0 epochs", "when it begins", read=units.length, only=_PERTURBED)


def objective(model: Model, cfg, *, router_loss: bool = False) -> step.Objective:
    """The loss of a training step as `train.step` takes it.

    Loss passes run in train mode, each with its own statistics; the clean one updates the running statistics first, and
    the adversarial ones after it.

    Args:
        model: what is trained.
        cfg: the whole config: `system.loss` and its weights.
        router_loss: whether the loss is the router's by `system.router_loss`, else it is `system.loss`.
    """
    name, system = cfg.system.loss, cfg.system
    labels_steer = router_loss and system.router_loss == "label_mod"

    def per_example(clean, adv, y, target):
        if labels_steer:
            return losses.label_mod(clean[1]["router_logits"], adv[1]["router_logits"], y, system.beta, system.beta)
        return by_name(system, clean and clean[0], adv and adv[0], target)

    def run(state, batch):
        y, target = batch["label"], batch.get("target", batch["label"])
        images = {"clean": batch["image"]} if name != "madry" or labels_steer else {}
        attacked = jnp.moveaxis(batch["adversarial"], 1, 0) if name != "natural" else ()
        images |= {f"adv{i or ''}": x_adv for i, x_adv in enumerate(attacked)}
        *outputs, batch_stats = model.train_pass(state.variables, jnp.stack(list(images.values()), 1))
        passes = passes_of(images, outputs)
        clean, *adversarial = [passes.get("clean"), *(v for which, v in passes.items() if which != "clean")]
        passed = adversarial or [None]
        loss = sum(jnp.mean(per_example(clean, adv, y, target)) for adv in passed) / len(passed)
        if system.balance_loss > 0:
            balance = [routing.balance_loss(aux["router_logits"], model.tokens) for _, aux in passes.values()]
            loss += system.balance_loss * sum(balance) / len(balance)
        return loss, (batch_stats, accuracies(passes, y) | model.metrics(passes))

    return run


def by_name(system: Any, clean: jax.Array | None, adv: jax.Array | None, y: jax.Array) -> jax.Array:
    """(B,) `system.loss` of logits (B, K) of clean and of attacked images, either of which it may not read.

    Args:
        system: fields loss, one of LOSSES, and beta.
        clean, adv: logits.
        y: labels (B,), or soft ones (B, K).
    """
    if system.loss in ("natural", "madry"):
        return losses.cross_entropy(clean if system.loss == "natural" else adv, y)
    return getattr(losses, system.loss)(clean, adv, y, system.beta)


def passes_of(names: Iterable[str], outputs: Any) -> dict[str, Any]:
    """{name: outputs of a pass} of outputs with leading (B, P), in their order."""
    return {which: jax.tree.map(lambda leaf, i=i: leaf[:, i], outputs) for i, which in enumerate(names)}


def accuracies(passes: Mapping[str, Any], y: jax.Array) -> dict[str, jax.Array]:
    """In train mode: "sa" of the clean pass, "ra" the mean of the adversarial ones."""
    rates = {which: jnp.mean(jnp.argmax(outputs[0], -1) == y) for which, outputs in passes.items()}
    robust = [rate for which, rate in rates.items() if which != "clean"]
    metrics = {"sa": rates["clean"]} if "clean" in rates else {}
    return metrics | ({"ra": sum(robust) / len(robust)} if robust else {})


@dataclasses.dataclass(frozen=True)
class Update:
    """One update: its name, the groups it trains, what it is fed, whose loss it takes, in which iterations it runs; and
    what it minimises, if not what the others of the system do."""

    name: str
    owns: tuple[str, ...]
    inputs: Inputs
    router_loss: bool = False
    every: int = 1
    objective: Callable[..., step.Objective] | None = None


def build(cfg, model: Model, data: pipeline.Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source],
          updates: tuple[Update, ...], describe: str, objective: Callable[..., step.Objective] = objective,
          masks: Mapping[str, Any] | None = None, after: Callable[[State], State] = states.masked,
          begin: Callable[[State], State] = lambda state: state, part: Part = states.PARAMETERS,
          turn: Callable[[State, jax.Array], jax.Array] | None = None,
          track: Callable[[State, Batch, dict[str, jax.Array]], State] | None = None,
          attacks: Callable[[Model, step.Attack | None], step.Attack | None] = lambda _, attack: attack) -> System:
    """A system whose iterations are `updates` in order.

    Args:
        cfg: the whole config.
        model: what is trained.
        data: its training images.
        mesh: of all devices.
        sources: finished runs that it starts from, by name; none: it starts afresh.
        updates: what an iteration does.
        describe: one line on the system.
        objective: what a system that changes the loss puts in the place of `objective`, and may build on it.
        masks: {group: tree} that it starts with; those of the sources unless given.
        after: applied to the state after each step.
        begin, part: as `train.state.fresh`.
        turn: as `train.step.preparation`; by train.several unless given.
        track: as `train.step.make`.
        attacks: (model as it is trained, its attack) -> what makes a step's images instead.
    Raises:
        UserError: system.awp is to move what is no weights, or would begin after the end.
    """
    per_epoch = pipeline.steps_per_epoch(len(data.rows), cfg.data.batch_size)
    length = units.steps(cfg.train.length, per_epoch, what="train.length")
    optimizers = {group: optim.make(cfg.optim[model.optim[group]], per_epoch, length, u.every)
                  for u in updates for group in u.owns}
    variables, inherited = initial(model, sources, cfg.seed)
    masks = inherited if masks is None else masks
    trained = model.in_training(cfg.train)

    def started(variables, masks=None):
        state = states.fresh(variables, optimizers, masks, begin=begin, part=part)
        return ema.begin(state) if cfg.train.ema else state

    def fresh(key):
        return started(model.init(rng.stream(key, "params")))

    compiled = jax.jit(fresh, out_shardings=meshes.replicated(mesh), compiler_options=xla.run_once_options())

    def init(key):
        if sources:
            return jax.device_put(started(variables, masks), meshes.replicated(mesh))
        return fresh(key) if tree.is_traced(key) else compiled(key)  # a program inside another takes no options

    loss = cfg.system.loss
    attack = None if loss == "natural" else adversary.training_attack(trained, cfg, "kl" if loss == "trades" else "ce")
    if turn is None and attack is not None and cfg.train.several == "pass":
        turn = functools.partial(_pass, per_epoch)
    prepare = step.preparation(attacks(trained, attack), seed=cfg.seed, mesh=mesh, data_cfg=cfg.data,
                               parts=cfg.train.accumulate, soften=_softening(cfg.system, model.num_classes), turn=turn)
    perturb = _perturbation(cfg, per_epoch, length, part)
    abstract = jax.eval_shape(init, jax.random.key(0))
    steps = tuple(
        step.make(u.name, (u.objective or objective)(trained, cfg, router_loss=u.router_loss), prepare, u.inputs,
                  owns=u.owns, optimizers=optimizers, state=abstract, mesh=mesh, every=u.every,
                  parts=cfg.train.accumulate, after=after, part=part, track=track, perturb=perturb)
        for u in updates)
    averaging = {"1 steps": ema.update(cfg.train.ema)} if cfg.train.ema else {}
    return System(init, steps, length, data.rows, model, describe, averaging)


def _pass(per_epoch: int, state: State, key: jax.Array) -> jax.Array:
    return state.step // per_epoch


def _perturbation(cfg, per_epoch: int, length: int, part: Part) -> awp.Perturbation | None:
    """What `system.awp` does to the weights of a step; None: nothing."""
    system = cfg.system
    if not system.awp:
        return None
    if part is not states.PARAMETERS:
        raise UserError(f"system.awp is {system.awp}: expected 0 with system.name={system.name}, which here trains "
                        "other than the parameters of its groups, or more")
    first = units.steps(system.awp_from, per_epoch, length, "system.awp_from")
    if first >= length > 0:
        raise UserError(f"system.awp_from is {system.awp_from!r}, iteration {first}: expected one before the end, "
                        f"which is {length}")
    return awp.make(system.awp, first)


def _softening(system: Any, num_classes: int) -> Callable[[jax.Array, Batch], Batch] | None:
    """What makes soft labels of a ready batch by the fields of `config.system`; None: labels stay."""
    if not (system.label_smoothing or system.mixup or system.cutmix):
        return None
    alpha, mix = (system.mixup, augment.mixup) if system.mixup else (system.cutmix, augment.cutmix)

    def soften(key, batch):
        target = losses.one_hot(batch["label"], num_classes, system.label_smoothing)
        if not alpha:
            return {"target": target}
        image, target = mix(key, batch["image"], target, alpha)
        return {"image": image, "target": target}

    return soften
