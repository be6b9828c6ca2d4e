"""Standard and robust accuracy of a trained model.

A robust example is classified correctly when clean and after every attack. A routed model is attacked through several
gradients (its views); its robust accuracy is the worst case per example. m images, L routed choices, E experts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import flags, objectives, verdicts
from advmoe_jax.attacks.flags import Flag
from advmoe_jax.attacks.suites import Suite
from advmoe_jax.attacks.verdicts import Found
from advmoe_jax.core import rng, units
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Split
from advmoe_jax.ops import augment, routing
from advmoe_jax.ops.statistics import wilson
from advmoe_jax.train.state import State
from advmoe_jax.train.system import System

_to_float = jax.jit(augment.to_float)


def _source(split, mesh):
    def rows(index):
        batch = pipeline.device_batch(mesh, split, index)
        return batch | {"image": _to_float(batch["image"])}

    return rows


def suspicions(system: System, state: State, split: Split, indices: np.ndarray, *, mesh, seed: int
               ) -> tuple[Flag, ...]:
    """Signs that attacks on this model cannot be trusted, on the first of the images. Arguments as `run`."""
    count = max(min(len(indices), flags.MOST_IMAGES) // mesh.size, 1) * mesh.size
    batch = _source(split, mesh)(np.resize(indices, count))
    logits_fn = objectives.logits_fn(system.outputs_fn(state, system.views[0]))
    return flags.of_model(logits_fn, batch["image"], batch["label"], rng.key(seed, "flags"))


def run(system: System, state: State, split: Split, indices: np.ndarray, suite: Suite, *, mesh,
        batch_size: int, seed: int, log: verdicts.Log | None = None) -> Found:
    """Attacks a model with a suite, through every view of the system.

    Args:
        system: gives the model.
        state: its weights.
        split: what to evaluate on.
        indices: (m,) rows of it.
        suite: the attacks.
        mesh: of all devices.
        batch_size: at most; rounded up to a multiple of the devices.
        seed: of the attacks.
        log: see verdicts.run.
    """
    views = {view: system.outputs_fn(state, view) for view in system.views}
    return verdicts.run(
        views, _source(split, mesh), indices, split.labels[indices],
        suite.specs, key=jax.random.key(seed), batch_size=-(-min(batch_size, len(indices)) // mesh.size) * mesh.size,
        survivors_only=suite.survivors_only, log=log,
        routed=system.routed_fn(state) if system.routed_fn else None)


def summarize(found: Found, suite: Suite, num_experts: int, noticed: tuple[Flag, ...] = (),
              earlier: tuple[verdicts.Attempt, ...] = ()) -> dict[str, Any]:
    """The record of a run: rates as fractions in [0, 1] with Wilson 95 % intervals.

    Args:
        found: from `run`.
        suite: as given to it.
        num_experts: E.
        noticed: from `suspicions`.
        earlier: attempts of other suites on the same model and images, which should not have missed what these found.
    """
    noticed += flags.of_attempts(dataclasses.replace(found, attempts=(*earlier, *found.attempts)))
    n, robust = len(found.index), found.survivors()
    attempts, stands = [], found.correct
    for attempt in found.attempts:
        survives = found.survivors([attempt])
        stands = stands & survives
        attempts.append({
            "attack": attempt.spec.label, "view": attempt.view, "settings": attempt.spec.settings,
            "attacked": int(attempt.attacked.sum()),
            "broken": int((attempt.attacked & found.correct & ~survives).sum()),
            "ra_after": float(stands.mean()), "seconds": round(attempt.seconds, 2), **attempt.passes})
        if not suite.survivors_only:
            attempts[-1]["ra"] = float(survives.mean())
        if attempt.spec.about.all_images:
            attempts[-1]["accuracy"] = float((attempt.after["label"] == found.label).mean())
    record = {
        "attack": suite.name, "norm": suite.norm, "eps": suite.eps,
        "eps_value": units.eps(suite.eps, suite.norm) if suite.norm and suite.eps else 0.0, "settings": suite.settings,
        "asked": suite.asked,
        "n": n, "sa": float(found.correct.mean()), "sa_interval": wilson(found.correct.sum(), n),
        "ra": float(robust.mean()), "ra_interval": wilson(robust.sum(), n),
        "ra_by_view": {} if suite.survivors_only else {
            view: float(found.survivors([attempt for attempt in found.attempts if attempt.view == view]).mean())
            for view in dict.fromkeys(attempt.view for attempt in found.attempts)},
        "unreliable": any(flag.unreliable for flag in noticed),
        "flags": [dataclasses.asdict(flag) for flag in noticed], "attempts": attempts,
        "largest_norm": _largest_norm(found.attempts),
        "seconds": round(sum(attempt.seconds for attempt in found.attempts), 2)}
    if num_experts > 1:
        counts = np.asarray(routing.load(jnp.asarray(found.clean["ids"]), num_experts))
        record |= {
            "load": (counts / n).tolist(), "load_entropy": np.asarray(routing.load_entropy(counts)).tolist(),
            "flip_rate": _flip_rate(found).tolist()}
    return record


def _largest_norm(attempts: Sequence[verdicts.Attempt]) -> float:
    return max((float(np.max(attempt.after[attempt.spec.config.norm], initial=0)) for attempt in attempts
                if getattr(attempt.spec.config, "norm", "") in attempt.after), default=0.0)


def _flip_rate(found: Found) -> np.ndarray:
    """(L,) share of the attacked images whose expert changes under the attempt that breaks most of its images."""
    worst = min(found.attempts, key=lambda attempt: found.survivors([attempt])[attempt.attacked].mean(
        ) if attempt.attacked.any() else 1.0)
    flips = worst.after["ids"] != found.clean["ids"]
    return flips[worst.attacked].mean(0) if worst.attacked.any() else np.zeros(flips.shape[-1])
