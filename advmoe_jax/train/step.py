"""Builds the steps of training: one compiled program makes batches ready, and one each updates the groups it owns."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data import pipeline
from advmoe_jax.ops import augment, idbh
from advmoe_jax.train import state as states
from advmoe_jax.train.awp import Perturbation
from advmoe_jax.train.state import Part, State
from advmoe_jax.train.system import Batch, Inputs, Step


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.train` that say how an update is computed."""

    accumulate: int = setting(1, "parts of a batch that are computed one after the other: less memory; BatchNorm uses "
                                 "the statistics of each part", least=1, most=65536)
    ema: float = setting(0.0, "decay of an average of the weights, evaluated beside them; 0: none", least=0,
                         most=0.999999)


def check(config) -> None:
    """Raises UserError for a batch that does not divide."""
    if config.data.batch_size % config.train.accumulate:
        raise UserError(f"train.accumulate is {config.train.accumulate}: expected a divisor of data.batch_size "
                        f"({config.data.batch_size})")


Attack = Callable[[dict[str, Any], jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(variables, key, x (B, H, W, C), y, index, step) -> (B, A, H, W, C), A adversarial images of each."""

Objective = Callable[[State, Batch], tuple[jax.Array, tuple[dict[str, Any], dict[str, jax.Array]]]]
"""(state, ready batch) -> (loss, (batch_stats, metrics)), of the parameters and statistics that the state holds."""


def preparation(attack: Attack | None, *, seed: int, mesh: jax.sharding.Mesh, data_cfg,
                parts: int = 1, soften: Callable[[jax.Array, Batch], Batch] | None = None,
                turn: Callable[[State, jax.Array], jax.Array] | None = None) -> Callable[[State, Batch, Inputs], Batch]:
    """What makes a batch ready: float "image"s, cropped and flipped, and, if there is an attack, "adversarial" ones.

    It is one compiled program for all steps that attack alike, whatever the seed and their random streams are.

    Args:
        attack: of the ready images; None: there is none.
        seed: of the run.
        mesh: of all devices.
        data_cfg: fields pad, flip and, where there are such, augment, jitter, turn and, of images that are decoded,
            crop.
        parts: of a batch, which are attacked one after the other. An image has a key of its own, so that nothing
            depends on them.
        soften: (key, ready batch) -> what it changes or adds, such as soft labels "target" (B, K); None: nothing.
        turn: (state, key) -> () int, by which attacks take turns, given to the attack in place of the step, and with
            the batch as "turn" (B,); None: the step.
    """
    jitter, degrees = getattr(data_cfg, "jitter", 0), getattr(data_cfg, "turn", 0)
    policy = pipeline.policy(data_cfg)

    def run(state: State, batch: Batch, seed: jax.Array, crops: jax.Array, noise: jax.Array) -> Batch:
        crop = rng.stream(rng.key(seed, crops, state.step), "augment")
        x = augment.to_float(augment.pad_crop_flip(crop, batch["image"], pipeline.padding(data_cfg), data_cfg.flip))
        x = augment.jitter(rng.stream(crop, "jitter"), x, jitter) if jitter else x
        x = augment.turn(rng.stream(crop, "turn"), x, degrees) if degrees else x
        x = idbh.augment(rng.stream(crop, "idbh"), x, policy) if policy else x
        ready = {**batch, "image": x}
        if soften is not None:
            ready |= soften(rng.stream(crop, "soften"), ready)
        if attack is not None:
            key = rng.stream(rng.key(seed, noise, state.step), "attack")
            number = state.step
            if turn is not None:
                number = turn(state, rng.stream(key, "turn"))
                ready["turn"] = jnp.full(x.shape[:1], number, jnp.int32)

            def of(part):
                return attack(state.variables, key, part["image"], part["label"], part["index"], number)

            ready["adversarial"] = _joined(jax.lax.map(of, _cut(ready, parts))) if parts > 1 else of(ready)
        return ready

    compiled = jax.jit(run, out_shardings=meshes.by_example(mesh))
    return lambda state, batch, inputs: compiled(state, batch, np.uint32(seed), rng.number(inputs.crops),
                                                 rng.number(inputs.noise))


def make(name: str, objective: Objective, prepare: Callable[[State, Batch, Inputs], Batch], inputs: Inputs, *,
         owns: Sequence[str], optimizers: dict[str, Any], state: State, mesh: jax.sharding.Mesh, every: int = 1,
         parts: int = 1, after: Callable[[State], State] = states.masked, part: Part = states.PARAMETERS,
         track: Callable[[State, Batch, dict[str, jax.Array]], State] | None = None,
         perturb: Perturbation | None = None) -> Step:
    """A step that descends `objective` in the parameters of the groups it owns, or in what `part` says instead.

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
        parts: of a batch, whose losses and gradients are averaged; each has its own statistics of BatchNorm, and
            running ones see one after the other.
        after: applied to the new state, last.
        part: what of a group is trained.
        track: (new state, ready batch, metrics) -> the state with what a system counts in `extra`; None: nothing.
        perturb: moves the parameters to where loss, statistics and gradients are taken, by gradients of the same batch
            where they are; None: they stay.
    """
    grad_names = tree.named_leaves({group: part.get(state)[group] for group in owns})
    tensors = ("loss", *(f"gradient {n}" for n in grad_names), *(f"parameter {n}" for n in grad_names))

    def update(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        def loss_of(owned, batch_stats, batch):
            return objective(part.put(state, owned).replace(batch_stats=batch_stats), batch)

        def at(weights):
            def of(stats, batch):
                (loss, (new, metrics)), grads = slope(weights, stats, batch)
                return {**stats, **new}, (loss, metrics, grads)

            if parts == 1:
                return of(state.batch_stats, batch)
            return _averaged(of, state.batch_stats, _cut(batch, parts))

        owned, slope = {group: part.get(state)[group] for group in owns}, jax.value_and_grad(loss_of, has_aux=True)
        weights = owned if perturb is None else perturb(state, owned, lambda: at(owned)[1][2])
        stats, (loss, metrics, grads) = at(weights)
        updated, opt, batch_stats = {}, dict(state.opt), dict(state.batch_stats)
        for group in owns:
            updates, opt[group] = optimizers[group].update(grads[group], opt[group], owned[group])
            updated[group] = optax.apply_updates(owned[group], updates)
            batch_stats[group] = stats.get(group, {})
            metrics[f"grad_norm_{group}"] = optax.global_norm(grads[group])
        finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(
            (loss, grads, updated))])
        metrics |= {"loss": loss, "non_finite": jnp.where(jnp.all(finite), -1, jnp.argmin(finite))}
        new = after(part.put(state, updated).replace(batch_stats=batch_stats, opt=opt))
        return new if track is None else track(new, batch, metrics), metrics

    compiled = jax.jit(update, donate_argnums=0, out_shardings=meshes.replicated(mesh))
    return Step(name, inputs, prepare, compiled, tuple(owns), tensors, every)


def _cut(batch: Batch, parts: int) -> Batch:
    """(B, ...) -> (parts, B / parts, ...), of images that each device has already."""
    return {name: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for name, x in batch.items()}


def _joined(x: jax.Array) -> jax.Array:
    """The reverse of `_cut`, of one array."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def _averaged(of: Callable, stats: dict[str, Any], batches: Batch) -> tuple[dict[str, Any], Any]:
    """The last statistics, and the mean of what (stats, batch) -> (stats, values) gives of each part."""
    parts = len(batches["label"])
    shape = jax.eval_shape(of, stats, jax.tree.map(lambda x: x[0], batches))[1]

    def add(carried, batch):
        stats, total = carried
        stats, values = of(stats, batch)
        return (stats, jax.tree.map(jnp.add, total, values)), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shape)
    (stats, total), _ = jax.lax.scan(add, (stats, zeros), batches)
    return stats, jax.tree.map(lambda leaf: leaf / parts, total)
