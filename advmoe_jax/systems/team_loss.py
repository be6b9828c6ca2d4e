"""The loss of EED: that of each member, a host defence, and what it adds against errors and for compactness.

Jung & Song, CVPR 2025, eq. 14 to 19. B batch, A attacks, M members, P passes, K classes.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from advmoe_jax.core import tree
from advmoe_jax.models.members import stacked
from advmoe_jax.models.team import Team
from advmoe_jax.ops import losses, teams
from advmoe_jax.systems import adversarial, soe
from advmoe_jax.train.state import State
from advmoe_jax.train.step import Objective

HOSTS = ("adp", "gal", "dverge", "soe")
"""Ensemble defences whose loss may be added."""


def objective(team: Team, cfg, **kind: Any) -> Objective:
    """The loss as `train.step` takes it, and beside its accuracies what its parts are.

    Args:
        team: as it is trained, with `taps` and `features` where its terms read them.
        cfg: the whole config.
    """
    system, name = cfg.system, cfg.system.loss

    def run(state, batch):
        y, target = batch["label"], batch.get("target", batch["label"])
        attacked, of_host = _attacked(system, batch, team.num_members)
        images = {"clean": batch["image"]} if name != "madry" else {}
        images |= {f"adv{i or ''}": x for i, x in enumerate(attacked)}
        *outputs, stats = team.train_pass(state.variables, jnp.stack([*images.values(), *of_host], 1))
        passes = adversarial.passes_of(images, outputs)
        clean, *adv = [passes.get("clean"), *(v for which, v in passes.items() if which != "clean")]
        members = jax.vmap(functools.partial(adversarial.by_name, system), (
            1 if clean else None, 1 if adv else None, None))
        learnt = [jnp.mean(jnp.sum(members(_logits(clean), _logits(of), target), 0)) for of in adv or [None]]
        learnt = sum(learnt) / len(learnt)
        hard, shown = (adv or [clean])[0], (attacked or [batch["image"]])[0]  # what the other terms are of
        h = jax.nn.softmax(_logits(hard))
        parts = {"wrong": jnp.mean(teams.misclassified(h, y, system.wrong_form))}
        total = learnt + system.omega * parts["wrong"]
        if system.host == "adp":
            parts["host"] = jnp.mean(teams.adp(h, y, system.adp_entropy, system.adp_diversity))
        elif system.host == "gal":
            parts["host"] = system.gal_weight * jnp.mean(teams.gal(_slopes(team, state, shown, y)))
        elif system.host == "dverge":
            crossed = jax.vmap(jax.vmap(losses.cross_entropy, (1, None)), (1, None))(
                outputs[1]["member_logits"][:, len(images):], y)  # (M that were shown, M, B)
            own = jnp.eye(team.num_members)[..., None]
            parts["host"] = system.dverge_weight * jnp.mean(jnp.sum(crossed * (1 - own), (0, 1)))
        elif system.host == "soe":
            said = soe.confidence(state, team, outputs[1]["features"][:, len(images):])
            found = jax.vmap(functools.partial(teams.soe, sigma=system.soe_sigma), (1, 1, None))(
                said, outputs[1]["member_logits"][:, len(images):], y)  # (M * A that were attacked, B)
            parts["host"] = system.soe_weight * jnp.mean(jnp.sum(found, 0)) / len(attacked)
        total += parts.get("host", 0)
        if system.gamma > 0:
            parts["compact"] = (system.lambda_weights * _weights(state, system.weights_form)
                                + system.lambda_activity * _activity(hard, h, system.activity_form))
            total += system.gamma * parts["compact"]
        return total, (stats, parts | adversarial.accuracies(passes, y) | team.metrics(passes))

    return run


def _attacked(system, batch, num_members):
    """Images (B, H, W, C) of each attack on the team, and those that a host defence has added to them."""
    if system.loss == "natural" and system.host != "dverge":
        return [], []
    found = list(jnp.moveaxis(batch["adversarial"], 1, 0))
    added = {"dverge": num_members, "soe": len(found) - len(found) // (num_members + 1)}.get(system.host, 0)
    return found[:len(found) - added], found[len(found) - added:]


def _logits(outputs):
    """(B, M, K), or None of no pass."""
    return outputs and outputs[1]["member_logits"]


def _slopes(team: Team, state: State, x: jax.Array, y: jax.Array) -> jax.Array:
    """(B, M, D), of each member's cross-entropy by the images, by running statistics."""
    def of(variables):
        return jax.grad(lambda u: jnp.sum(losses.cross_entropy(team.member.outputs_fn(variables)(u)[0], y)))(x)

    found = jax.lax.map(of, stacked(team.members(state.variables)))
    return jnp.moveaxis(found, 0, 1).reshape(len(x), team.num_members, -1)


def _weights(state: State, form: str) -> jax.Array:
    """The sum over the members of the mean size of the weights that they have, or of the sum of all their sizes."""
    total = 0.0
    for group, params in state.params.items():
        masks = tree.named_leaves(state.masks.get(group, {}))
        kernels = {path: leaf for path, leaf in tree.named_leaves(params).items() if path.endswith("/kernel")}
        sizes = sum(jnp.sum(jnp.abs(leaf)) for leaf in kernels.values())
        if form == "mean":
            sizes /= sum(_count(masks.get(path), leaf) for path, leaf in kernels.items())
        total += sizes
    return total


def _count(mask: jax.Array | None, leaf: jax.Array) -> Any:
    return leaf.size if mask is None else jnp.sum(jnp.broadcast_to(mask, leaf.shape) != 0)


def _activity(outputs: Any, h: jax.Array, form: str) -> jax.Array:
    """The mean smooth share of activations that are not zero; or, as the equation is printed, the number of the
    members' probabilities that are not, which has no gradient."""
    if form == "printed":
        return jnp.mean(jnp.sum((h != 0).astype(h.dtype), (1, 2)))
    return jnp.mean(outputs[1]["activity"])


def reads_activity(system: Mapping[str, Any]) -> bool:
    """Whether loss passes must say how active layers are."""
    return system.gamma > 0 and system.lambda_activity > 0 and system.activity_form == "smooth"
