"""Builds the steps of training: one compiled program makes batches ready, and one each updates the groups it owns."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.data import pipeline
from advmoe_jax.ops import augment
from advmoe_jax.train import state as states
from advmoe_jax.train.state import State
from advmoe_jax.train.system import Batch, Inputs, Step

Attack = Callable[[dict[str, Any], jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(variables, key, x (B, H, W, C), y, index, step) -> (B, A, H, W, C), A adversarial images of each."""

Objective = Callable[..., tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]]
"""(params, batch_stats, batch) -> (loss, (batch_stats, metrics)), the batch being ready."""


def preparation(attack: Attack | None, *, seed: int, mesh: jax.sharding.Mesh, data_cfg
                ) -> Callable[[State, Batch, Inputs], Batch]:
    """What makes a batch ready: float "image"s, cropped and flipped, and, if there is an attack, "adversarial" ones.

    It is one compiled program for all steps that attack alike, whatever their random streams are.

    Args:
        attack: of the ready images; None: there is none.
        seed: of the run.
        mesh: of all devices.
        data_cfg: fields pad, flip and, of images that are decoded, crop.
    """
    def run(state: State, batch: Batch, crops: jax.Array, noise: jax.Array) -> Batch:
        crop = rng.stream(rng.key(seed, crops, state.step), "augment")
        x = augment.to_float(augment.pad_crop_flip(crop, batch["image"], pipeline.padding(data_cfg), data_cfg.flip))
        ready = {**batch, "image": x}
        if attack is not None:
            key = rng.stream(rng.key(seed, noise, state.step), "attack")
            ready["adversarial"] = attack(state.variables, key, x, batch["label"], batch["index"], state.step)
        return ready

    compiled = jax.jit(run, out_shardings=meshes.by_example(mesh))
    return lambda state, batch, inputs: compiled(state, batch, rng.number(inputs.crops), rng.number(inputs.noise))


def make(name: str, objective: Objective, prepare: Callable[[State, Batch, Inputs], Batch], inputs: Inputs, *,
         owns: Sequence[str], optimizers: dict[str, Any], state: State, mesh: jax.sharding.Mesh, every: int = 1,
         after: Callable[[State], State] = states.masked) -> Step:
    """A step that descends `objective` in the parameters of the groups it owns.

    Parameters, optimizer states and running statistics of other groups pass through untouched.

    Args:
        name: of the step.
        objective: what to minimise.
        prepare: makes its batches ready.
        inputs: random streams of its batches.
        owns: parameter groups.
        optimizers: {group: optax transformation}.
        state: an abstract state, for the names of its tensors.
        mesh: of all devices.
        every: as Step.every.
        after: applied to the new state, last.
    """
    owned_params = {group: state.params[group] for group in owns}
    grad_names = tree.named_leaves(owned_params)
    tensors = ("loss", *(f"gradient {n}" for n in grad_names), *(f"parameter {n}" for n in grad_names))

    def update(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
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
        return after(state.replace(params=params, batch_stats=batch_stats, opt=opt)), metrics

    compiled = jax.jit(update, donate_argnums=0, out_shardings=meshes.replicated(mesh))
    return Step(name, inputs, prepare, compiled, tuple(owns), tensors, every)
