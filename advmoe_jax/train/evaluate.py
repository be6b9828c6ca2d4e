"""Standard and robust accuracy of a trained model.

A robust example is classified correctly when clean and under every gradient that was attacked through. A routed
model is attacked through several (its views); its robust accuracy is the worst case per example, and the accuracy
under each is shown beside it. B batch, L routed choices, E experts, V views.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import objectives
from advmoe_jax.attacks.parse import Spec
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.ops import augment, balls, routing
from advmoe_jax.ops.statistics import wilson
from advmoe_jax.train.state import State
from advmoe_jax.train.system import System


@jax.jit
def _predict(outputs_fn, x):
    with jax.default_matmul_precision("float32"):  # an accelerator's own default is coarser
        logits, aux = outputs_fn(x)
    return jnp.where(jnp.any(jnp.isnan(logits), -1), -1, jnp.argmax(logits, -1)), aux.get("expert_ids")


@jax.jit
def _to_float(images):
    return augment.to_float(images)


@jax.jit
def _logits(outputs_fn, x):
    return outputs_fn(x)[0]


def predictions(system: System, state: State, arrays: dict[str, np.ndarray], indices: np.ndarray,
                specs: tuple[Spec, ...], *, mesh, batch_size: int, seed: int, views: tuple[str, ...]
                ) -> dict[str, Any]:
    """What the model says about every image, clean and attacked.

    Attack keys are folded from the index of the image, so that nothing depends on the batch size. The last batch
    is padded and the padding dropped afterwards.

    Args:
        system: gives the model.
        state: its weights.
        arrays: {"image": (n, H, W, C) uint8, "label": (n,)}.
        indices: (m,) images to evaluate.
        specs: attacks.
        mesh: of all devices.
        batch_size: at most; rounded up to a multiple of the devices.
        seed: of the attacks.
        views: gradients to attack through.
    Returns:
        "label", "clean" (m,), "clean_ids" (m, L) or None, and per attack, in order, in "attacked": "label" and
        "ids" of shapes (V, m), (V, m, L), the largest norm of a perturbation, and seconds.
    """
    batch_size = -(-min(batch_size, len(indices)) // mesh.size) * mesh.size
    hard = system.outputs_fn(state, "none")
    rows: list[dict[str, Any]] = []
    seconds = [0.0] * len(specs)
    for index, mask in pipeline.padded_batches(indices, batch_size):
        batch = meshes.put_batch(mesh, index, arrays)
        x, y = _to_float(batch["image"]), batch["label"]
        clean, clean_ids = meshes.fetch(_predict(hard, x))
        row = {"clean": clean[mask], "ids": None if clean_ids is None else clean_ids[mask], "attacked": []}
        for i, spec in enumerate(specs):
            start = time.perf_counter()
            keys = rng.per_example(rng.key(seed, f"attack_eval/{spec.name}"), batch["index"])
            goal = _logits(hard, x) if getattr(spec.config, "loss", "") == "kl" else y
            outcomes = []
            for view in views:
                x_adv = spec.run(objectives.logits_fn(system.outputs_fn(state, view)), keys, x, goal)
                size = _checked_size(x_adv, x, spec)
                label, ids = meshes.fetch(_predict(hard, x_adv))
                outcomes.append((label[mask], None if ids is None else ids[mask], size))
            row["attacked"].append(outcomes)
            seconds[i] += time.perf_counter() - start
        rows.append(row)
    return {
        "label": arrays["label"][indices], "clean": np.concatenate([r["clean"] for r in rows]),
        "clean_ids": _join([r["ids"] for r in rows]),
        "attacked": [{
            "label": np.stack([np.concatenate([r["attacked"][i][v][0] for r in rows]) for v in range(len(views))]),
            "ids": _stack([_join([r["attacked"][i][v][1] for r in rows]) for v in range(len(views))]),
            "largest_norm": max(r["attacked"][i][v][2] for r in rows for v in range(len(views))),
            "seconds": seconds[i]} for i in range(len(specs))]}


def _join(parts):
    return None if parts[0] is None else np.concatenate(parts)


def _stack(parts):
    return None if parts[0] is None else np.stack(parts)


@jax.jit
def _extent(x_adv, x):
    delta = x_adv - x
    # On several devices min and max lose a NaN.
    return (jnp.all(jnp.isfinite(x_adv)), jnp.min(x_adv), jnp.max(x_adv),
            {kind: jnp.max(balls.norm(delta, kind)) for kind in balls.NORMS})


def _checked_size(x_adv, x, spec) -> float:
    """The largest perturbation of a batch; an attack that left its budget or the box is a bug, not a result."""
    finite, low, high, sizes = meshes.fetch(_extent(x_adv, x))
    eps = units.eps(spec.config.eps, spec.config.norm)
    size = float(sizes[spec.config.norm])
    if not (finite and size <= eps * (1 + 1e-4) + 1e-6 and low >= 0 and high <= 1):
        raise UserError(f"{spec.label} left its budget: {spec.config.norm} norm {size:.6g} for eps {eps:.6g}, "
                        f"pixels {low:.6g} to {high:.6g} for 0 to 1; its result is discarded")
    return size


def survivors(found: dict[str, Any]) -> np.ndarray:
    """Which of the images (m,) are classified correctly when clean, and under every attack and view."""
    robust = found["clean"] == found["label"]
    for attacked in found["attacked"]:
        robust &= (attacked["label"] == found["label"]).all(0)
    return robust


def summarize(found: dict[str, Any], specs: tuple[Spec, ...], views: tuple[str, ...], num_experts: int
              ) -> list[dict[str, Any]]:
    """One record per attack: rates as fractions in [0, 1] with Wilson 95 % intervals.

    Args:
        found: from `predictions`.
        specs, views: as given to it.
        num_experts: E.
    """
    correct = found["clean"] == found["label"]
    n = len(correct)
    records = []
    for spec, attacked in zip(specs, found["attacked"]):
        survives = correct & (attacked["label"] == found["label"])
        robust = survives.all(0)
        record = {
            "attack": spec.label, "norm": spec.config.norm, "eps": str(spec.config.eps),
            "eps_value": units.eps(spec.config.eps, spec.config.norm),
            "settings": spec.settings, "n": n,
            "sa": float(correct.mean()), "sa_interval": wilson(correct.sum(), n),
            "ra": float(robust.mean()), "ra_interval": wilson(robust.sum(), n),
            "ra_by_view": {view: float(s.mean()) for view, s in zip(views, survives)},
            "largest_norm": attacked["largest_norm"], "seconds": round(attacked["seconds"], 2)}
        if num_experts > 1:
            counts = np.asarray(routing.load(jnp.asarray(found["clean_ids"]), num_experts))
            worst = int(survives.mean(1).argmin())
            record |= {
                "load": (counts / n).tolist(),
                "load_entropy": np.asarray(routing.load_entropy(counts)).tolist(),
                "flip_rate": (attacked["ids"][worst] != found["clean_ids"]).mean(0).tolist()}
        records.append(record)
    return records
