"""The loop: evaluate? save? next batch, steps, log one iteration late. One loop for all systems."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.attacks import parse
from advmoe_jax.attacks.suites import Suite
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import rng, units
from advmoe_jax.core.errors import NonFiniteError, Preempted
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Split
from advmoe_jax.train import checkpoint, evaluate, log, preemption
from advmoe_jax.train.state import State
from advmoe_jax.train.system import Batch, Stage, System

_SECONDS_BETWEEN_LINES = 15
_COLLAPSED = 0.1  # entropy of the load, mean over iterations; of two experts one then gets over 98 % of the images


def abstract_state(system: System, mesh: jax.sharding.Mesh) -> State:
    """Shapes, types and shardings of the system's state, without computing anything."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=meshes.replicated(mesh)),
        jax.eval_shape(system.init, rng.key(0, "init")))


def run(config: ConfigDict, workdir: Path, system: System, train: Split,
        select: tuple[Split, np.ndarray], mesh: jax.sharding.Mesh) -> None:
    """Trains to the end of the last stage, from the newest checkpoint if there is one.

    When to evaluate, save and log follows from the step alone, so that a run that was killed and started again
    ends with the same bits. The results are the checkpoints.

    Args:
        config: the whole config.
        workdir: gets metrics.jsonl and checkpoints/.
        system: what to train.
        train: the training images.
        select: a split and the rows of it that choose the best checkpoint.
        mesh: of all devices.
    Raises:
        NonFiniteError: a loss, gradient or parameter is NaN or infinite.
        Preempted: SIGTERM came; the state is saved.
    """
    metrics = log.Metrics(workdir / "metrics.jsonl")
    saved = checkpoint.open_checkpoints(workdir)
    try:
        with preemption.watch() as notice:
            state = saved.restore_newest(abstract_state(system, mesh), log.warn)
            if state is None:
                state = system.init(rng.key(config.seed, "init"))
            step = restored = int(state.step)
            metrics.cut_back(step)
            if step:
                log.say(f"continuing from the checkpoint of step {step}")
            total = sum(stage.length for stage in system.stages)
            batch_size = config.data.batch_size
            best = saved.best_rates()
            window, pending, collapsed = [], None, {}
            window_start = line_at = time.perf_counter()

            def settle():
                """Fetches the metrics of the last iteration, which has been dispatched and not looked at."""
                nonlocal pending
                if pending is not None:
                    of_stage, values = pending[0], meshes.fetch_replicated(pending[1])
                    _check_finite(step, of_stage, values, saved)
                    window.append({k: v for k, v in values.items() if not k.endswith("non_finite")})
                    pending = None

            while True:
                stage, per_epoch = _stage_at(system, step, batch_size)
                due = _due(config, step, per_epoch, total) if step != restored else ()
                if due:
                    settle()
                if window and due:
                    means = log.means(window)
                    means["images_per_second"] = len(window) * batch_size / (time.perf_counter() - window_start)
                    metrics.write(step, "train", means | {"epoch": step / per_epoch})
                    collapsed = _warn_of_collapse(means, collapsed)
                    if "eval" in due or time.perf_counter() - line_at > _SECONDS_BETWEEN_LINES:
                        log.say(log.line(step, total, step / per_epoch, means, batch_size))
                        line_at = time.perf_counter()
                if "eval" in due:
                    best = _select_best(config, system, state, step, select, mesh, metrics, saved, best)
                if "save" in due:
                    saved.save("last", step, state, {"stage": stage.name})
                if due:
                    window, window_start = [], time.perf_counter()
                if step == total:
                    return
                if notice.reached(step):
                    settle()
                    if step not in saved.steps("last"):
                        saved.save("last", step, state, {"stage": stage.name})
                    raise Preempted(f"stopped by SIGTERM; saved at step {step} of {total}: "
                                    "the same command continues from there")

                def batch_of(stream, stage=stage, step=step):
                    rows = pipeline.batch_indices(stage.indices, batch_size, config.seed, stream, step)
                    return pipeline.device_batch(mesh, train, rows)

                state, fresh = iterate(stage, state, step, batch_of)
                settle()
                pending = stage, fresh
                step += 1
    finally:
        saved.close()


def iterate(stage: Stage, state: State, step: int, batch_of: Callable[[str], Batch]
            ) -> tuple[State, dict[str, jax.Array]]:
    """Runs the steps of a stage whose turn it is.

    Args:
        stage: what is trained.
        state: is donated.
        step: number of the iteration.
        batch_of: stream -> its batch of this iteration.
    Returns:
        The new state, and the metrics under "STEP/NAME".
    """
    metrics, batches = {}, {}
    for update in stage.steps:
        if step % update.every:
            continue
        if update.stream not in batches:
            batches[update.stream] = batch_of(update.stream)
        state, batches[update.stream], values = update.run(state, batches[update.stream])
        metrics |= {f"{update.name}/{k}": v for k, v in values.items()}
    return state, metrics


def _stage_at(system: System, step: int, batch_size: int) -> tuple[Stage, int]:
    """The stage that iteration `step` is in (the last one at the end), and its steps per epoch."""
    for stage in system.stages:
        if step < stage.length:
            break
        step -= stage.length
    return stage, pipeline.steps_per_epoch(len(stage.indices), batch_size)


def _due(config: ConfigDict, step: int, per_epoch: int, total: int) -> tuple[str, ...]:
    """What is to be done before iteration `step`.

    Each of them ends a window of the log, so that a resumed run writes the same lines, but for the one window that
    SIGTERM cuts in two: its line is of the iterations after the resumption.
    """
    def falls(name):
        every = units.steps(config.train[name], per_epoch, total, f"train.{name}")
        return step == total or (every > 0 and step % every == 0)

    if step == 0:
        return ()
    due = tuple(name for name in ("eval", "save") if falls(f"{name}_every"))
    return due or (("log",) if falls("log_every") else ())


def _select_best(config, system, state, step, select, mesh, metrics, saved, best) -> tuple[float, float]:
    """Measures the images that select, keeps the state if its (RA, SA) beats `best`, and returns the better one."""
    split, indices = select
    specs = parse.attacks(config.train.attack, norm=config.attack.norm, eps=config.attack.eps)
    found = evaluate.run(system, state, split, indices, Suite("selection", specs, survivors_only=True), mesh=mesh,
                         batch_size=config.eval.batch_size, seed=config.seed)
    sa, ra = float(found.correct.mean()), float(found.survivors().mean())
    metrics.write(step, config.train.select_on, {"sa": sa, "ra": ra})
    better = (ra, sa) > best
    if better:
        saved.save("best", step, state, {"sa": sa, "ra": ra})
    log.say(f"step {step} {config.train.select_on} SA {100 * sa:.2f} RA {100 * ra:.2f} "
            f"({', '.join(spec.label for spec in specs)}, {len(indices)} images){', best so far' if better else ''}")
    return (ra, sa) if better else best


def _check_finite(step: int, stage: Stage, values: dict[str, Any], saved: checkpoint.Checkpoints) -> None:
    for update in stage.steps:
        index = int(values.get(f"{update.name}/non_finite", -1))  # it may not have run in this iteration
        if index >= 0:
            steps = saved.steps("last")
            good = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise NonFiniteError(f"step {step}: {update.tensors[index]} of the {update.name} update is not finite; "
                                 f"{good}. Try a lower learning rate, a warm-up or optim.*.clip_norm=1")


def _collapsed(means: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{update: layers of which one expert gets nearly all images, in every iteration its own perhaps}."""
    return {name.split("/")[0]: tuple(map(int, layers)) for name, entropy in means.items()
            if name.endswith("/load_entropy") and len(layers := np.flatnonzero(entropy < _COLLAPSED))}


def _warn_of_collapse(means: dict[str, Any], before: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Warns of layers that have collapsed since `before`; gives those that have now."""
    collapsed = _collapsed(means)
    for name, layers in collapsed.items():
        if layers != before.get(name):
            log.warn(f"{name}: one expert gets nearly all images in {len(layers)} of {len(means[f'{name}/load'])} "
                     f"layers ({', '.join(map(str, layers))}): lower optim.router.learning_rate, or set "
                     "system.balance_loss=0.01")
    unseen = {name: layers for name, layers in before.items() if f"{name}/load_entropy" not in means}
    return unseen | collapsed
