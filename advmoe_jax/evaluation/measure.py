"""Standard and robust accuracy of a trained model.

A robust example is classified correctly when clean and after every attack. A model with several gradients (its views)
is attacked through each; its robust accuracy is the worst case per example. m images.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import objectives
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import find, rng, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Split
from advmoe_jax.evaluation import black_box, flags, suites, verdicts
from advmoe_jax.evaluation.flag import Flag
from advmoe_jax.evaluation.suites import Suite
from advmoe_jax.evaluation.verdicts import Found
from advmoe_jax.models import model as models
from advmoe_jax.models.model import Model, Variables
from advmoe_jax.ops import augment
from advmoe_jax.ops.statistics import wilson

_to_float = jax.jit(augment.to_float)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A model as a part of a tree that holds no arrays."""

    model: Model


def _observed(static, outputs_fn, x):
    logits, aux = outputs_fn(x)
    finite = [jnp.all(jnp.isfinite(leaf.reshape(len(x), -1)), -1) for leaf in aux.values()]
    return logits, static.model.observe(aux) | {"finite": functools.reduce(jnp.logical_and, finite, True)}


def _source(split, mesh):
    def rows(index):
        batch = pipeline.device_batch(mesh, split, index)
        return batch | {"image": _to_float(batch["image"])}

    return rows


def check(suite: Suite, model: Model) -> None:
    """Raises UserError if an attack of the suite needs what the model does not have, or cannot take its images, or a
    budget is out of reach."""
    suites.check_shape(suite, model.image_shape)
    aux = models.output_shapes(model)[1] if any(spec.about.needs for spec in suite.specs) else {}
    for spec in suite.specs:
        missing = [name for name in spec.about.needs if name not in aux]
        if missing or spec.about.takes not in ("logits", "values", "outputs", *model.surfaces):
            what = f"reads {', '.join(missing)}" if missing else f"attacks a {spec.about.takes} model"
            raise UserError(f"{spec.name} {what}, and the model is {model.kind}: expected attacks that it can take")
        of_images = getattr(find.module("attacks", spec.name, defines="make"), "check", None)
        if of_images is not None:
            of_images(spec.config, model.image_shape[-1])


def suspicions(model: Model, variables: Variables, split: Split, rows: np.ndarray, *, mesh, seed: int
               ) -> tuple[Flag, ...]:
    """Signs that attacks on this model cannot be trusted, on the first of the images. Arguments as `run`."""
    count = max(min(len(rows), flags.MOST_IMAGES) // mesh.size, 1) * mesh.size
    batch = _source(split, mesh)(np.resize(rows, count))
    first, *others = (objectives.logits_fn(model.outputs_fn(variables, view)) for view in model.views)
    return flags.of_weights(variables) + flags.of_views(first, dict(zip(model.views[1:], others)), batch["image"]) + (
        flags.of_model(first, batch["image"], batch["label"], rng.key(seed, "flags")))


def run(model: Model, variables: Variables, split: Split, rows: np.ndarray, suite: Suite, *, mesh, batch_size: int,
        seed: int, checks: Sequence[Spec] = (), log: verdicts.Log | None = None) -> Found:
    """Attacks a model with a suite, through every view of it.

    Args:
        model: what is attacked.
        variables: its weights.
        split: images.
        rows: (m,) those to evaluate.
        suite: the attacks.
        mesh: of all devices.
        batch_size: at most; rounded up to a multiple of the devices.
        seed: of the attacks.
        checks, log: see verdicts.run.
    """
    views = {view: model.outputs_fn(variables, view) for view in model.views}
    judge = jax.tree_util.Partial(_observed, _Static(model), views[model.views[0]])
    return verdicts.run(
        views, _source(split, mesh), rows, split.labels[rows], suite.specs, key=jax.random.key(seed),
        batch_size=-(-min(batch_size, len(rows)) // mesh.size) * mesh.size, survivors_only=suite.survivors_only,
        checks=checks, log=log, judge=judge,
        surfaces={name: surface(variables) for name, surface in model.surfaces.items()},
        of_logits=getattr(model, "logit_views", ()))


def summarize(found: Found, suite: Suite, model: Model, noticed: tuple[Flag, ...] = (),
              earlier: tuple[verdicts.Attempt, ...] = ()) -> dict[str, Any]:
    """The record of a run: rates as fractions in [0, 1] with Wilson 95 % intervals, and what the model says.

    Args:
        found: from `run`.
        suite: as given to it.
        model: as given to it.
        noticed: from `suspicions`.
        earlier: attempts of other suites on the same model and images, which should not have missed what these found.
    """
    noticed += flags.not_finite(found) + black_box.flags(found) + flags.of_attempts(
        dataclasses.replace(found, attempts=(*earlier, *found.attempts)))
    n, robust, facts = len(found.index), found.survivors(), _facts(found, model)
    attempts, left = [], found.correct
    for attempt in found.attempts:
        survives = found.survivors([attempt])
        left = left & survives
        attempts.append({
            "attack": attempt.spec.label, "view": attempt.view, "settings": attempt.spec.settings,
            "attacked": int(attempt.attacked.sum()),
            "broken": int((attempt.attacked & found.correct & ~survives).sum()),
            "ra_after": float(left.mean()), "seconds": round(attempt.seconds, 2), **attempt.passes})
        if not (suite.survivors_only or attempt.is_check):
            attempts[-1]["ra"] = float(survives.mean())
        if attempt.spec.about.all_images:
            attempts[-1]["accuracy"] = float(found.right_after([attempt]).mean())
    return {
        "attack": suite.name, "norm": suite.norm, "eps": suite.eps,
        "eps_value": units.eps(suite.eps, suite.norm) if suite.norm and suite.eps else 0.0, "settings": suite.settings,
        "asked": suite.asked,
        "n": n, "sa": float(found.correct.mean()), "sa_interval": wilson(found.correct.sum(), n),
        "ra": float(robust.mean()), "ra_interval": wilson(robust.sum(), n),
        "ra_by_view": {} if suite.survivors_only else {
            view: float(found.survivors([attempt for attempt in found.own if attempt.view == view]).mean())
            for view in dict.fromkeys(attempt.view for attempt in found.own)},
        "by_attack": [] if suite.survivors_only else [
            {"attack": spec.label, "norm": spec.settings.get("norm", ""), "eps": spec.settings.get("eps", ""),
             "ra": _rate(found, (spec,))} | (
                 {"accuracy": float(found.right_after(_by(found, (spec,))).mean())} if spec.about.all_images else {})
            for spec in suite.specs],
        "unions": {} if suite.survivors_only else {name: _rate(found, specs) for name, specs in suite.unions.items()},
        "unreliable": any(flag.unreliable for flag in noticed),
        "flags": [dataclasses.asdict(flag) for flag in noticed], "attempts": attempts,
        "largest_norm": _largest_norm(found.attempts), "facts": facts,
        "fact_tables": [dataclasses.asdict(table) for table in model.fact_tables(facts)],
        "seconds": round(sum(attempt.seconds for attempt in found.attempts), 2)}


def _rate(found: Found, specs: Sequence[Spec]) -> float:
    """Robust accuracy under some of the attacks, through every gradient."""
    return float(found.survivors(_by(found, specs)).mean())


def _by(found: Found, specs: Sequence[Spec]) -> list[verdicts.Attempt]:
    return [attempt for attempt in found.own if any(attempt.spec is of for of in specs)]


def _largest_norm(attempts: Sequence[verdicts.Attempt]) -> float:
    return max((float(np.max(attempt.after[attempt.spec.config.norm], initial=0)) for attempt in attempts
                if getattr(attempt.spec.config, "norm", "") in attempt.after), default=0.0)


def _facts(found: Found, model: Model) -> dict[str, Any]:
    """What the model says of the clean images and of the attempt that breaks most of its images."""
    def left(attempt):
        counted = attempt.attacked & found.correct
        return found.survivors([attempt])[counted].mean() if counted.any() else 1.0

    worst = min(found.own, key=left)
    return model.facts(found.label, found.clean, worst.after, worst.attacked)
