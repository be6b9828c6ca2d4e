"""Training against two attacks whose answers are drawn together, with what natural training agrees to: RAMP.

Jiang & Singh, "RAMP: Boosting adversarial robustness against multiple lp perturbations for universal robustness",
NeurIPS 2024. The loss is that of the worse attack of an image, and KL(p_q || p_r) of the answers to both where that to
the first is right. Of the gradient of natural training, leaf by leaf, its part along the adversarial one is added. The
paper projects what an epoch of each has changed; here every step is projected, so that no second network is trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data.pipeline import Data
from advmoe_jax.models.model import Model
from advmoe_jax.ops import losses
from advmoe_jax.systems import adversarial, adversary
from advmoe_jax.systems.adversarial import Update, build
from advmoe_jax.systems.sources import Source
from advmoe_jax.train.step import Objective
from advmoe_jax.train.system import Inputs, System


@dataclasses.dataclass(frozen=True)
class Config(adversarial.Config):
    """Fields of `config.system`."""

    loss: str = setting("madry", "what is trained on attacked images", choices=("madry",))
    pairing: float = setting(5.0, "lambda, weight of the KL between the answers to both attacks", least=0, most=1e6)
    natural: float = setting(0.5, "beta, share of the natural gradient in a step", least=0, most=1)


def check(config) -> None:
    """Raises UserError unless there are two attacks, of which both count."""
    attacks = adversary.named(config, "ce")
    if len(attacks) != 2 or config.train.several != "mean":
        raise UserError(f"train.attack names {len(attacks)} attacks and train.several is {config.train.several}: "
                        "expected two, and several mean, with system.name=ramp, which pairs them")


def make(cfg, model: Model, data: Data, mesh: jax.sharding.Mesh, sources: Mapping[str, Source]) -> System:
    """Builds the system. Arguments as `systems.adversarial.build`."""
    return build(cfg, model, data, mesh, sources, (Update("train", model.groups, Inputs("data", "train", "train")),),
                 f"RAMP({model.kind})", objective=_objective)


def projected(adversarial: Any, natural: Any, share: float) -> Any:
    """(1 - share) a + share max(cos(a, n), 0) n of each leaf of two trees of gradients, a and n."""
    def of(a, n):
        sizes = jnp.linalg.norm(a.ravel()) * jnp.linalg.norm(n.ravel())
        cosine = jnp.sum(a * n) / jnp.maximum(sizes, 1e-30)
        return (1 - share) * a + share * jnp.maximum(cosine, 0) * n

    return jax.tree.map(of, adversarial, natural)


def paired(first: jax.Array, second: jax.Array, y: jax.Array, is_right: jax.Array, weight: float) -> jax.Array:
    """() mean cross-entropy of the worse of two answers, and `weight` times the mean KL between them, first to second,
    where the first is right.

    Args:
        first, second: (B, K) logits under the attacks.
        y: (B,) labels or (B, K) soft ones.
        is_right: (B,) bool, of the first.
        weight: lambda.
    """
    worse = jnp.maximum(losses.cross_entropy(first, y), losses.cross_entropy(second, y))
    apart = jnp.where(is_right, losses.kl(first, second), 0)
    return jnp.mean(worse) + weight * jnp.sum(apart) / jnp.maximum(jnp.sum(is_right), 1)


def _objective(model: Model, cfg, **kind: Any) -> Objective:
    """A loss of the value of the paired one, whose gradient is the projected one."""
    system = cfg.system

    def run(state, batch):
        y, target = batch["label"], batch.get("target", batch["label"])

        def attacked(params):
            logits, aux, stats = model.train_pass(state.variables | {"params": params}, batch["adversarial"])
            right = jnp.argmax(logits, -1) == y[:, None]
            loss = paired(logits[:, 0], logits[:, 1], target, right[:, 0], system.pairing)
            passes = {"adv": (logits[:, 1], {name: leaf[:, 1] for name, leaf in aux.items()})}
            return loss, (stats, {"ra": jnp.mean(right)} | model.metrics(passes))

        def natural(params):
            logits, *_ = model.train_pass(state.variables | {"params": params}, batch["image"][:, None])
            return jnp.mean(losses.cross_entropy(logits[:, 0], target)), jnp.mean(jnp.argmax(logits[:, 0], -1) == y)

        here = jax.lax.stop_gradient(state.params)
        (loss, (stats, metrics)), along = jax.value_and_grad(attacked, has_aux=True)(here)
        slope, sa = jax.grad(natural, has_aux=True)(here)
        step = jax.lax.stop_gradient(projected(along, slope, system.natural))
        tangent = sum(jax.tree.leaves(jax.tree.map(lambda p, g: jnp.sum(p * g), state.params, step)))
        return loss + tangent - jax.lax.stop_gradient(tangent), (stats, metrics | {"sa": sa})

    return run
