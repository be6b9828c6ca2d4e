"""Builds one jitted update of the parameter groups that it owns."""

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

Objective = Callable[..., tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array], Batch]]]
"""(params, batch_stats, batch, key) -> (loss, (batch_stats, metrics, kept)), batch["image"] being float in [0, 1].

`kept` is what a later step of the iteration finds in the batch that it shares.
"""


def make(name: str, objective: Objective, *, owns: Sequence[str], optimizers: dict[str, Any], state: State,
         seed: int, mesh: jax.sharding.Mesh, data_cfg, stream: str, crops: str, ends_iteration: bool,
         every: int = 1) -> Step:
    """A step that descends `objective` in the parameters of the groups it owns.

    Parameters, optimizer states and running statistics of other groups pass through untouched.

    Args:
        name: of the step; also the random stream of its attack.
        objective: what to minimise.
        owns: parameter groups.
        optimizers: {group: optax transformation}.
        state: an abstract state, for the names of its tensors.
        seed: of the run.
        mesh: of all devices.
        data_cfg: fields pad and flip.
        stream: of its batches.
        crops: random stream of their crops and flips; steps that share a batch share it.
        ends_iteration: whether `state.step` goes up.
        every: as Step.every.
    """
    owned_params = {group: state.params[group] for group in owns}
    grad_names = tree.named_leaves(owned_params)
    tensors = ("loss", *(f"gradient {n}" for n in grad_names), *(f"parameter {n}" for n in grad_names))

    def run(state: State, batch: Batch) -> tuple[State, Batch, dict[str, jax.Array]]:
        crop = rng.stream(rng.key(seed, crops, state.step), "augment")
        images = augment.pad_crop_flip(crop, batch["image"], data_cfg.pad, data_cfg.flip)

        def loss_of(owned):
            return objective({**state.params, **owned}, state.batch_stats,
                             {**batch, "image": augment.to_float(images)},
                             rng.stream(rng.key(seed, name, state.step), "attack"))

        owned = {group: state.params[group] for group in owns}
        (loss, (stats, metrics, kept)), grads = jax.value_and_grad(loss_of, has_aux=True)(owned)
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
        return State(step, params, batch_stats, opt), {**batch, **kept}, metrics

    everywhere = meshes.replicated(mesh)
    jitted = jax.jit(run, donate_argnums=0, out_shardings=(everywhere, meshes.by_example(mesh), everywhere))
    return Step(name, jitted, stream, tuple(owns), tensors, every)
