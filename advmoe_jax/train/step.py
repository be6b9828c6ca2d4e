"""Builds the steps of training: one compiled program makes batches ready, and one each updates the groups it owns."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.ops import augment
from advmoe_jax.train.state import State
from advmoe_jax.train.system import Batch, Step

Attack = Callable[[dict[str, Any], jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(variables, key, x, y, index) -> x_adv."""

Prepare = Callable[[State, Batch, jax.Array, jax.Array], Batch]
"""(state, batch, crops, noise) -> the batch with float "image"s and, if there is an attack, "adversarial" ones; crops
and noise are the numbers of random streams (`rng.number`)."""

Objective = Callable[..., tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]]
"""(params, batch_stats, batch) -> (loss, (batch_stats, metrics)), the batch being ready."""


def preparation(attack: Attack | None, *, seed: int, mesh: jax.sharding.Mesh, data_cfg) -> Prepare:
    """The compiled program that crops, flips and attacks, for all steps that attack alike.

    Args:
        attack: of the ready images; None: there is none.
        seed: of the run.
        mesh: of all devices.
        data_cfg: fields pad and flip.
    """
    def run(state: State, batch: Batch, crops: jax.Array, noise: jax.Array) -> Batch:
        crop = rng.stream(rng.key(seed, crops, state.step), "augment")
        x = augment.to_float(augment.pad_crop_flip(crop, batch["image"], data_cfg.pad, data_cfg.flip))
        ready = {**batch, "image": x}
        if attack is not None:
            key = rng.stream(rng.key(seed, noise, state.step), "attack")
            ready["adversarial"] = attack(state.variables, key, x, batch["label"], batch["index"])
        return ready

    return jax.jit(run, out_shardings=meshes.by_example(mesh))


def make(name: str, objective: Objective, prepare: Prepare, *, owns: Sequence[str], optimizers: dict[str, Any],
         state: State, mesh: jax.sharding.Mesh, stream: str, crops: str, ends_iteration: bool, every: int = 1,
         shares_attack: bool = False) -> Step:
    """A step that descends `objective` in the parameters of the groups it owns.

    Parameters, optimizer states and running statistics of other groups pass through untouched.

    Args:
        name: of the step; also the random stream of its attack.
        objective: what to minimise.
        prepare: makes its batches ready.
        owns: parameter groups.
        optimizers: {group: optax transformation}.
        state: an abstract state, for the names of its tensors.
        mesh: of all devices.
        stream: of its batches.
        crops: random stream of their crops and flips; steps that share a batch share it.
        ends_iteration: whether `state.step` goes up.
        every: as Step.every.
        shares_attack: whether steps of the same stream get its batch when it is ready.
    """
    owned_params = {group: state.params[group] for group in owns}
    grad_names = tree.named_leaves(owned_params)
    tensors = ("loss", *(f"gradient {n}" for n in grad_names), *(f"parameter {n}" for n in grad_names))
    streams = rng.number(crops), rng.number(name)

    def descend(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        def loss_of(owned):
            return objective({**state.params, **owned}, state.batch_stats, batch)

        owned = {group: state.params[group] for group in owns}
        (loss, (stats, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(owned)
        params, opt, batch_stats = dict(state.params), dict(state.opt), dict(state.batch_stats)
        for group in owns:
            updates, opt[group] = optimizers[group].update(grads[group], opt[group], params[group])
            params[group] = optax.apply_updates(params[group], updates)
            batch_stats[group] = stats.get(group, {})
            metrics[f"grad_norm_{group}"] = optax.global_norm(grads[group])
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(
            (loss, grads, {group: params[group] for group in owns}))])
        metrics |= {"loss": loss, "non_finite": jnp.where(jnp.all(finite), -1, jnp.argmin(finite))}
        step = state.step + 1 if ends_iteration else state.step
        return State(step, params, batch_stats, opt), metrics

    descend = jax.jit(descend, donate_argnums=0, out_shardings=meshes.replicated(mesh))

    def run(state: State, batch: Batch) -> tuple[State, Batch, dict[str, jax.Array]]:
        ready = batch if "adversarial" in batch else prepare(state, batch, *streams)
        state, metrics = descend(state, ready)
        return state, ready if shares_attack else batch, metrics

    return Step(name, run, stream, tuple(owns), tensors, every)
