"""RT-ER: a mixture of experts is trained on its adversary, and single experts on their own; JTDMoE: two such mixtures.

Zhang et al., "Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach", ICML 2025. The loss of
a mixture F with experts f_i is CE(F(x'), y) + beta KL(f_i(x) || f_i(x_i')), where x' attacks F and x_i' expert i alone:
of each image the expert that the gate ranks second, or every one, added up. With model.name=dual two updates follow
each other, as JTDMoE has them: the robust mixture by that loss, then the standard one by the cross-entropy of both
together on clean images, the robust one being fixed.

In the released code the gate, a linear layer on the pixels whose best expert answers, gets no gradient and stays as it
began (system.gate_grad=served), and the joint training takes every expert. Its experts normalise by running statistics
in nearly all loss passes, since attacks leave them in evaluation mode (model.expert_norm=evaluation).

B batch, P passes, M experts, K classes.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.data.pipeline import Data
from advmoe_jax.models import dual
from advmoe_jax.models.members import of_group, stacked
from advmoe_jax.models.mixture import GATE, Mixture
from advmoe_jax.models.model import Model
from advmoe_jax.ops import gating, losses, routing
from advmoe_jax.systems import adversarial, adversary
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.sources import Source
from advmoe_jax.train.step import Attack, Objective
from advmoe_jax.train.system import Inputs, System

_ATTACKED = Only("system.loss=madry", lambda config: config.system.get("loss") == "madry")
_ALONE = Only("system.loss=madry and system.experts second or every", lambda config: (
    _ATTACKED.holds(config) and config.system.get("experts") != "none"))
_CHOOSES = Only("model.serve top-1, top-2 and so on", lambda config: config.model.get("serve", "all") != "all")


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    loss: str = setting("madry", "of the answer, on attacked images; natural: on clean ones, and nothing else",
                        choices=("madry", "natural"))
    beta: float = setting(6.0, "weight of the experts' robust term", least=0, most=1e6, only=_ALONE)
    experts: str = setting("second", "of which experts: the gate's second of an image, every one, or none: adversarial "
                                     "training of the whole", choices=("second", "every", "none"), only=_ATTACKED)
    gate_grad: str = setting("straight", "gradient of the gate: as if all experts answered by its weights; or of the "
                                         "weights that count, of which that of a single expert has none, as released",
                             choices=("straight", "served"), only=_CHOOSES)
    balance_loss: float = setting(0.0, "weight of the Switch Transformer's load-balance loss of the gate", least=0,
                                  most=1e6)


def check(config) -> None:
    """Raises UserError for a model that has no gate, or an adversary that does not fit."""
    model, system = config.model, config.system
    if model.name not in ("mixture", "dual"):
        raise UserError(f"model.name is {model.name}: expected mixture or dual with system.name=rt_er, which trains a "
                        "gate and its experts")
    if model.gate == "uniform":
        raise UserError("model.gate is uniform: expected linear or trained with system.name=rt_er, which ranks experts")
    if model.name == "dual" and system.loss == "natural":
        raise UserError("system.loss is natural with model.name=dual: expected madry; the standard mixture of a dual "
                        "model always learns from clean images")
    if system.loss == "madry" and config.train.several == "mean":
        raise UserError("train.several is mean with system.name=rt_er: expected turn, pass, worst or largest, one "
                        "image for the mixture and one for each expert")


def make(cfg, model: Model, data: Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    fed, (mixture, _) = Inputs("data", "train", "train"), _mixture_of(model, {})
    # The loss does not reach the gate: it stays as it is, without weight decay too.
    rests = mixture.served == 1 and cfg.system.gate_grad == "served" and not cfg.system.balance_loss

    def update(name, groups, objective):
        owns = tuple(group for group in groups if not (rests and group.endswith(GATE)))
        return Update(name, owns, fed, objective=objective)

    if isinstance(model, dual.Dual):
        title, updates = "JTDMoE", (update("lower", model.groups_of("robust"), _of_mixture),
                                    update("upper", model.groups_of("standard"), _of_standard))
    else:
        title = "RT-ER" if cfg.system.loss == "madry" else "natural"
        updates = (update("train", model.groups, _of_mixture),)
    return build(cfg, model, data, mesh, sources, updates, f"{title}: {model.kind}",
                 attacks=functools.partial(_beside, cfg))


# Attacks.


@dataclasses.dataclass(frozen=True)
class _Expert:
    """What attacks take of a mixture where one expert is named for each image, {"mixture": variables, "ids": (B,)}."""

    mixture: Mixture
    surfaces = {}

    @property
    def image_shape(self):
        return self.mixture.image_shape

    @property
    def kind(self):
        return self.mixture.kind

    def outputs_fn(self, variables, view="none"):
        return self.mixture.expert_fn(variables["mixture"], variables["ids"])


def _mixture_of(model: Model, variables: Mapping[str, Any]) -> tuple[Mixture, dict[str, Any]]:
    """The mixture that is made robust, and its variables."""
    return (model.mixture, dual.of_part(variables, "robust")) if isinstance(model, dual.Dual) else (model, variables)


def _beside(cfg, model: Model, attack: Attack | None) -> Attack | None:
    """Images that attack the mixture, and those that attack single experts: (B, 1 + 0, 1 or M, H, W, C)."""
    if attack is None:
        return None
    mixture, _ = _mixture_of(model, {})
    on_answer, on_named = (adversary.training_attack(of, cfg, "ce") for of in (mixture, _Expert(mixture)))
    on_network = [adversary.training_attack(net, cfg, "ce") for net in mixture.experts]

    def of_every(own, *of):
        networks = [of_group(own, group) for group in mixture.members]
        if mixture.is_alike:
            return jnp.moveaxis(jax.lax.map(lambda one: on_network[0](one, *of)[:, 0], stacked(networks)), 0, 1)
        return jnp.concatenate([attack(one, *of) for attack, one in zip(on_network, networks)], 1)

    def run(variables, key, x, y, index, turn):
        _, own = _mixture_of(model, variables)
        of = key, x, y, index, turn
        found = [on_answer(own, *of)]
        if cfg.system.experts == "second":
            found.append(on_named({"mixture": own, "ids": second(mixture, own, x)}, *of))
        elif cfg.system.experts == "every":
            found.append(of_every(own, *of))
        return jnp.concatenate(found, 1)

    return run


def second(mixture: Mixture, variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """(B,) int32, the expert that the gate ranks second on each image (B, H, W, C)."""
    scores = jax.lax.stop_gradient(mixture.outputs_fn(variables)(x)[1]["gate_logits"])
    return gating.top(scores, 2)[0][:, 1]


# Losses.


def _answers(mixture: Mixture, system: Any, logits: jax.Array, gate_logits: jax.Array) -> jax.Array:
    """(B, P, M, K), (B, P, M) -> (B, P, K), the answers of the experts that count."""
    weights = gating.taken(gate_logits, mixture.served, system.gate_grad == "straight")
    flat = gating.combined(logits.reshape(-1, *logits.shape[2:]), weights.reshape(-1, weights.shape[-1]),
                           mixture.combine)
    return flat.reshape(*logits.shape[:2], -1)


def _of_mixture(model: Model, cfg, **_: Any) -> Objective:
    """RT-ER's loss, or the natural one: of a mixture, or of the robust one of a dual model."""
    def run(state, batch):
        mixture, own = _mixture_of(model, state.variables)
        loss, (stats, passes), metrics = _loss(mixture, cfg.system, own, batch)
        if isinstance(model, dual.Dual):
            stats = dual.named({"batch_stats": stats}, "robust")["batch_stats"]
        return loss, (stats, adversarial.accuracies(passes, batch["label"]) | mixture.metrics(passes) | metrics)

    return run


def _loss(mixture, system, variables, batch):
    """The loss of a mixture, its statistics and passes, and what else is logged."""
    x, target, metrics = batch["image"], batch.get("target", batch["label"]), {}
    images, own = {"clean": x}, None
    if system.loss != "natural":
        images["adv"] = batch["adversarial"][:, 0]
    if system.loss != "natural" and system.experts != "none":
        own = jnp.broadcast_to(batch["adversarial"][:, 1:], (len(x), mixture.num_members, *x.shape[1:]))
    logits, gate_logits, stats = mixture.passes(variables, jnp.stack(list(images.values()), 1), own)
    found = _answers(mixture, system, logits[:, :len(images)], gate_logits)
    passes = {name: (found[:, i], {"gate_logits": gate_logits[:, i]}) for i, name in enumerate(images)}
    loss = jnp.mean(losses.cross_entropy(found[:, -1], target))
    if own is not None:
        change = losses.kl(logits[:, 0], logits[:, 2])  # (B, M)
        if system.experts == "second":
            change = jnp.take_along_axis(change, second(mixture, variables, x)[:, None], 1)
        metrics["expert_kl"] = jnp.mean(jnp.sum(change, -1))
        loss += system.beta * metrics["expert_kl"]
    if system.balance_loss > 0:
        loss += system.balance_loss * routing.balance_loss(gate_logits)
    return loss, (stats, passes), metrics


def _of_standard(model: dual.Dual, cfg, **_: Any) -> Objective:
    """The cross-entropy of the whole dual model on clean images; the robust mixture answers as users have it."""
    mixture, system = model.mixture, cfg.system

    def run(state, batch):
        x, target = batch["image"], batch.get("target", batch["label"])
        logits, gate_logits, stats = mixture.passes(dual.of_part(state.variables, "standard"), x[:, None])
        own = _answers(mixture, system, logits, gate_logits)[:, 0]
        fixed = mixture.outputs_fn(dual.of_part(state.variables, "robust"))(x)
        answer, _ = model.together([(own, {"member_logits": logits[:, 0], "gate_logits": gate_logits[:, 0]}), fixed])
        passes = {"clean": (answer, {"gate_logits": gate_logits[:, 0]})}
        loss = jnp.mean(losses.cross_entropy(answer, target))
        if system.balance_loss > 0:
            loss += system.balance_loss * routing.balance_loss(gate_logits)
        metrics = adversarial.accuracies(passes, batch["label"]) | mixture.metrics(passes)
        return loss, (dual.named({"batch_stats": stats}, "standard")["batch_stats"], metrics)

    return run
