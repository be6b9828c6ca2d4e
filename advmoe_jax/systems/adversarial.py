"""Training on attacked images, as one update or several: the attack, the loss, its metrics, the system.

x images (B, H, W, C) in [0, 1], y labels (B,), E experts, L routed choices.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import pgd
from advmoe_jax.attacks.objectives import NAMED, Objective
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, units, xla
from advmoe_jax.core.errors import one_of
from advmoe_jax.data import pipeline
from advmoe_jax.models.network import Network
from advmoe_jax.ops import losses, routing
from advmoe_jax.train import optim, step
from advmoe_jax.train import state as states
from advmoe_jax.train.system import Stage, System

LOSSES = ("natural", "madry", "trades", "mart")
ORDERS = ("router_first", "backbone_first")
ROUTER_LOSSES = ("trades", "label_mod")
VIEWS = ("none", "ste_selected", "ste_full")


def training_attack(network: Network, cfg, loss: str) -> step.Attack:
    """Builds the attack of a training step.

    BatchNorm uses running statistics and none is written. Gradients go through the router by `router_grad`.
    With `router_weight` > 0 the attack also increases that multiple of KL(clean || adversarial) of the router's
    scores, mean over its choices, as the released AdvMoE code does with weight 1.

    Args:
        network: the model.
        cfg: `config.attack`.
        loss: "kl" against the clean logits (TRADES) or "ce" against the labels.
    """
    routed = network.num_experts > 1
    route = routing.hard(cfg.router_grad if routed else "none")
    router_weight = cfg.router_weight if routed else 0
    base = NAMED[loss]

    def both(outputs, target):
        (logits, aux), (goal, scores) = outputs, target
        value = base.loss(logits, goal)
        if router_weight > 0:
            value += router_weight * jnp.mean(losses.kl(scores, aux["router_logits"]), -1)
        return value

    objective = Objective(both, lambda outputs, target: base.success(outputs[0], target[0]))
    attack = pgd.make(pgd.Config(
        norm=cfg.norm, eps=cfg.eps, num_steps=cfg.num_steps, step_size=cfg.step_size, start=cfg.start,
        loss=objective, keep="last"))

    def run(variables, key, x, y, index):
        outputs_fn = network.outputs_fn(variables, route)
        target = (y, None)
        if loss == "kl" or router_weight > 0:
            logits, aux = outputs_fn(x)
            target = (logits if loss == "kl" else y, aux.get("router_logits"))
        return attack(outputs_fn, rng.per_example(key, index), x, target)

    return run


def objective(network: Network, cfg, *, router_loss: bool = False) -> step.Objective:
    """The loss of a training step as `train.step` takes it.

    Loss passes run in train mode, each with its own statistics; the clean one updates the running statistics first, and
    the adversarial one after it.

    Args:
        network: the model.
        cfg: the whole config: `system.loss` and its weights, `model.router_grad`.
        router_loss: whether the loss is the router's by `system.router_loss`, else it is `system.loss`.
    """
    name, system = cfg.system.loss, cfg.system
    labels_steer = router_loss and system.router_loss == "label_mod"
    route = routing.hard(cfg.model.router_grad if network.num_experts > 1 else "none", detach=True)

    def per_example(clean, adv, y):
        if labels_steer:
            return losses.label_mod(clean[1]["router_logits"], adv[1]["router_logits"], y, system.beta, system.beta)
        if name == "natural":
            return losses.cross_entropy(clean[0], y)
        if name == "madry":
            return losses.cross_entropy(adv[0], y)
        return getattr(losses, name)(clean[0], adv[0], y, system.beta)

    def run(params, batch_stats, batch):
        passes = {"clean": batch["image"]} if name != "madry" or labels_steer else {}
        passes |= {"adv": batch["adversarial"]} if name != "natural" else {}
        *outputs, batch_stats = network.apply_train(
            {"params": params, "batch_stats": batch_stats}, jnp.stack(list(passes.values()), 1), route)
        seen = {which: jax.tree.map(lambda leaf, i=i: leaf[:, i], outputs) for i, which in enumerate(passes)}
        clean, adv = seen.get("clean"), seen.get("adv")
        loss = jnp.mean(per_example(clean, adv, batch["label"]))
        if network.num_experts > 1 and system.balance_loss > 0:
            balance = [routing.balance_loss(aux["router_logits"]) for _, aux in seen.values()]
            loss += system.balance_loss * sum(balance) / len(balance)
        return loss, (batch_stats, _metrics(network, clean, adv, batch["label"]))

    return run


def _metrics(network: Network, clean: Any, adv: Any, y: jax.Array) -> dict[str, jax.Array]:
    """Accuracies in train mode, and the router's load entropy and flip rate per choice."""
    metrics = {}
    for name, outputs in (("sa", clean), ("ra", adv)):
        if outputs is not None:
            metrics[name] = jnp.mean(jnp.argmax(outputs[0], -1) == y)
    if network.num_experts > 1:
        ids = (adv if clean is None else clean)[1]["expert_ids"]
        counts = routing.load(ids, network.num_experts)
        metrics["load"] = counts / ids.shape[0]
        metrics["load_entropy"] = routing.load_entropy(counts)
        if clean is not None and adv is not None:
            metrics["flip_rate"] = jnp.mean(ids != adv[1]["expert_ids"], axis=0)
    return metrics


@dataclasses.dataclass(frozen=True)
class Update:
    """One update: its name, the groups it trains, its data stream, whose loss it takes, in which iterations it runs."""

    name: str
    owns: tuple[str, ...]
    stream: str
    router_loss: bool = False
    every: int = 1


def build(cfg, network: Network, indices: np.ndarray, mesh: jax.sharding.Mesh, updates: tuple[Update, ...],
          describe: str) -> System:
    """A system of one stage whose iterations are `updates` in order.

    Args:
        cfg: the whole config.
        network: the model.
        indices: training images.
        mesh: of all devices.
        updates: what an iteration does.
        describe: one line on the system.
    """
    loss = one_of("system.loss", cfg.system.loss, LOSSES)
    one_of("system.order", cfg.system.order, ORDERS)
    one_of("system.router_loss", cfg.system.router_loss, ROUTER_LOSSES)
    per_epoch = pipeline.steps_per_epoch(len(indices), cfg.data.batch_size)
    length = units.steps(cfg.train.length, per_epoch, what="train.length")
    optimizers = {group: optim.make(cfg.optim[group], per_epoch, length, u.every)
                  for u in updates for group in u.owns}

    def fresh(key):
        return states.fresh(network.init(rng.stream(key, "params")), optimizers)

    abstract = jax.eval_shape(fresh, jax.random.key(0))
    attack = None if loss == "natural" else training_attack(network, cfg.attack, "kl" if loss == "trades" else "ce")
    prepare = step.preparation(attack, seed=cfg.seed, mesh=mesh, data_cfg=cfg.data)
    steps = tuple(
        step.make(u.name, objective(network, cfg, router_loss=u.router_loss), prepare, owns=u.owns,
                  optimizers=optimizers, state=abstract, mesh=mesh, stream=u.stream,
                  crops=next(first.name for first in updates if first.stream == u.stream),
                  ends_iteration=u is updates[-1], every=u.every, shares_attack=cfg.system.share_attack)
        for u in updates)
    views = VIEWS if network.num_experts > 1 else VIEWS[:1]
    return System(
        init=jax.jit(fresh, out_shardings=meshes.replicated(mesh), compiler_options=xla.run_once_options()),
        stages=(Stage("train", length, indices, steps),),
        outputs_fn=lambda state, view: network.outputs_fn(state.variables, routing.hard(view)),
        views=views, network=network, describe=describe,
        routed_fn=(lambda state: network.routed_fn(state.variables)) if network.num_experts > 1 else None)
