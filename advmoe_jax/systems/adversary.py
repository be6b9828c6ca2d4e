"""The adversary of training: attacks named as in evaluation, one or several, on the loss that is trained.

B batch, A attacks whose images all count, x images (B, H, W, C) in [0, 1], y labels (B,).
"""

import dataclasses

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import parse
from advmoe_jax.attacks.objectives import NAMED, Objective
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.evaluation import measure
from advmoe_jax.evaluation.suites import Suite
from advmoe_jax.models.model import Model
from advmoe_jax.models.network import HAS_ROUTER, ROUTED
from advmoe_jax.ops import balls, losses, routing
from advmoe_jax.train.step import Attack

ATTACKED = Only("a system.loss other than natural", lambda config: config.system.get("loss") != "natural")
_ROUTED, _ROUTER = (Only(f"{of.when} and {ATTACKED.when}", lambda config, of=of: (
    of.holds(config) and ATTACKED.holds(config))) for of in (ROUTED, HAS_ROUTER))


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.attack`: the threat, which evaluations share unless they say otherwise, and how training
    attacks see the router."""

    norm: str = setting("linf", "norm of the perturbation", choices=balls.NORMS)
    eps: str = setting("8/255", "its size, in pixel units of [0, 1]")
    router_grad: str = setting("none", "gradient of the choices in training attacks; none: they are constants",
                               choices=routing.ROUTER_GRADS, only=_ROUTED)
    router_weight: float = setting(0.0, "weight of KL(clean || adversarial) of the router's scores in training attacks",
                                   least=0, most=1e6, only=_ROUTER)


@dataclasses.dataclass(frozen=True)
class Training:
    """Fields of `config.train` that name the adversary."""

    attack: str = setting("pgd(num_steps=2,step_size=0.625 eps,start=gaussian,keep=last)",
                          "attacks of training, named as in eval.attacks", only=ATTACKED)
    several: str = setting("turn", "several attacks: in turn, an iteration each, or a pass over the images each; the "
                                   "worst of an image, or the one of largest loss on the batch; or the mean of their "
                                   "losses", choices=("turn", "pass", "worst", "largest", "mean"), only=ATTACKED)


def check(config) -> None:
    """Raises UserError for a threat or an attack of training that cannot be."""
    units.eps(config.attack.eps, config.attack.norm, "attack.eps")
    standard = Config()
    if config.attack.norm != standard.norm and config.attack.eps == standard.eps:
        raise UserError(f"attack.norm is {config.attack.norm} and attack.eps still {standard.eps}, which is for "
                        f"{standard.norm}: expected an eps in that norm, such as 0.5 for l2 or 12 for l1")
    if ATTACKED.holds(config):
        named(config, "ce")


def named(config, loss: str | Objective) -> tuple[Spec, ...]:
    """The attacks of `config.train.attack`, which raise `loss` unless they name another."""
    return parse.attacks(config.train.attack, norm=config.attack.norm, eps=config.attack.eps, loss=loss)


def training_attack(model: Model, config, loss: str) -> Attack:
    """Builds the adversary of a training step, (variables, key, x, y, index, turn) -> (B, A, H, W, C).

    BatchNorm uses running statistics and none is written. Gradients go through the view `attack.router_grad`.
    With `attack.router_weight` > 0 attacks also increase that multiple of KL(clean || adversarial) of the router's
    scores, mean over its choices, as the released AdvMoE code does with weight 1.

    Args:
        model: what is attacked.
        config: the whole config.
        loss: "kl" against the clean logits (TRADES) or "ce" against the labels.
    Raises:
        UserError: an attack needs what the model does not have.
    """
    cfg = config.attack
    base = NAMED[loss]

    def value(outputs, target):
        (logits, aux), (goal, scores) = outputs, target
        total = base.loss(logits, goal)
        if cfg.router_weight > 0:
            total += cfg.router_weight * jnp.mean(losses.kl(scores, aux["router_logits"]), -1)
        return total

    objective = Objective(value, lambda outputs, target: base.success(outputs[0], target[0]))
    specs = named(config, objective)
    measure.check(Suite("training", specs, survivors_only=False), model)

    def by(spec, variables, outputs_fn, keys, x, y, target):
        if getattr(spec.config, "loss", None) is objective:
            return spec.run(outputs_fn, keys, x, target)
        if spec.about.takes in model.surfaces:
            return spec.run(model.surfaces[spec.about.takes](variables), keys, x, y)
        return spec.run(spec.function(outputs_fn), keys, x, y)

    def run(variables, key, x, y, index, turn):
        outputs_fn = model.outputs_fn(variables, cfg.router_grad)
        target = (y, None)
        if loss == "kl" or cfg.router_weight > 0:
            logits, aux = outputs_fn(x)
            target = (logits if loss == "kl" else y, aux.get("router_logits"))
        common = variables, outputs_fn, rng.per_example(key, index), x, y, target
        if len(specs) == 1:
            return by(specs[0], *common)[:, None]
        if config.train.several in ("turn", "pass"):
            branches = [lambda spec=spec: by(spec, *common) for spec in specs]
            return jax.lax.switch(turn % len(specs), branches)[:, None]
        images = jnp.stack([by(spec, *common) for spec in specs], 1)
        if config.train.several == "mean":
            return images
        values = jnp.stack([objective.loss(outputs_fn(images[:, i]), target) for i in range(len(specs))], 1)
        values = jnp.mean(values, 0, keepdims=True) if config.train.several == "largest" else values
        worst = jnp.broadcast_to(jnp.argmax(values, 1), x.shape[:1])
        return jnp.take_along_axis(images, worst[:, None, None, None, None], 1)

    return run
