"""The loop: evaluate? save? next batch, steps, log one iteration late. One loop for all systems."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import console, rng, stop, units
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import NonFiniteError, Preempted, UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data import feed, pipeline
from advmoe_jax.data.split import Split
from advmoe_jax.models.model import Model
from advmoe_jax.train import checkpoint, log
from advmoe_jax.train.checkpoint import Checkpoints
from advmoe_jax.train.state import State
from advmoe_jax.train.system import Batch, System

_SECONDS_BETWEEN_LINES = 15

Rates = tuple[float, float]
"""(robust accuracy, standard accuracy), fractions in [0, 1]; the larger pair is the better checkpoint."""


def _length_of_training(value: str, name: str) -> None:
    amount, unit = units.length(value, name)
    if 0 < amount < 1 or unit == "%":
        raise UserError(f"{name} is {value!r}: expected for example '12 epochs' or '300 steps'")


def check(config) -> None:
    """Raises UserError for a run that does nothing."""
    if units.length(config.train.length, "train.length")[0] == 0 and not config.init_from:
        raise UserError(f"train.length is {config.train.length!r}: expected more, or init_from with a finished run")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.train` that the loop reads."""

    length: str = setting("100 epochs", "how long to train, in epochs or steps", read=_length_of_training)
    eval_every: str = setting("1 epochs", "when the best checkpoint is chosen; '0 steps': at the end",
                              read=units.length)
    save_every: str = setting("1 epochs", "when the last checkpoint is saved; '0 steps': at the end", read=units.length)
    log_every: str = setting("20 steps", "when metrics are written; '0 steps': with the others", read=units.length)
    select_on: str = setting("validation", "images that choose the best checkpoint; test as papers do is optimistic",
                             choices=("validation", "test"))
    select_attack: str = setting("pgd(num_steps=10)", "attacks that choose the best checkpoint")
    select_examples: int = setting(1000, "images that choose it, at most", least=1, most=10**9)
    criteria: str = setting("", "attacks that are measured on these images too, each alone, before the first step and "
                                "whenever the best checkpoint is chosen; they choose nothing")


def abstract_state(system: System, mesh: jax.sharding.Mesh) -> State:
    """Shapes, types and shardings of the system's state, without computing anything."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=meshes.replicated(mesh)),
        jax.eval_shape(system.init, rng.key(0, "init")))


def run(config: ConfigDict, workdir: epath.Path, system: System, train: Split, select: Callable[[State], Rates],
        mesh: jax.sharding.Mesh, criteria: Callable[[State], Mapping[str, float]] | None = None) -> State:
    """Trains to the end, from the newest checkpoint if there is one.

    When to evaluate, save and log follows from the step alone, so that a run that was killed and started again
    ends with the same bits.

    Args:
        config: the whole config.
        workdir: gets metrics.jsonl and checkpoints/.
        system: what to train.
        train: the training images.
        select: measures a state on the images that choose the best checkpoint.
        mesh: of all devices.
        criteria: {name: number} of a state that is written beside what `select` measures; None: nothing is.
    Returns:
        The state at the end.
    Raises:
        NonFiniteError: a loss, gradient or parameter is NaN or infinite.
        Preempted: SIGTERM came; the state is saved.
    """
    total, batch_size = system.length, config.data.batch_size
    per_epoch = pipeline.steps_per_epoch(len(system.rows), batch_size)
    metrics = log.Metrics(workdir / "metrics.jsonl")
    about = {"config": configs.to_json(config)}
    with (checkpoint.opened(workdir, about=about) as saved, stop.saved_first(),
          feed.opened(config.data, config.seed, train, system.rows, system.visits, mesh) as batch_of):
        state, is_new = _begin(config, system, saved, metrics, mesh)
        first, best = int(state.step), saved.best_rates()
        window, pending, told = [], None, {}
        window_start = line_at = time.perf_counter()
        for step in range(first, total + 1):
            if due := _due(config, step, per_epoch, total) if step > first or is_new else ():
                pending = _settle(window, pending, system, saved)
                if window:
                    means = log.means(window)
                    means["images_per_second"] = len(window) * batch_size / (time.perf_counter() - window_start)
                    metrics.write(step, "train", means | {"epoch": step / per_epoch})
                    told = _watch(system.model, means, batch_size, len(window), told)
                    if "eval" in due or time.perf_counter() - line_at > _SECONDS_BETWEEN_LINES:
                        console.say(log.line(step, total, step / per_epoch, means, batch_size, system.model.progress))
                        line_at = time.perf_counter()
                if "eval" in due and step >= min(system.first_best, total):
                    rates, more = select(state), criteria(state) if criteria else {}
                    may_be_best = step > 0 or not total
                    best = _select_best(config, step, state, rates, more, best, may_be_best, metrics, saved)
                if "save" in due:
                    saved.save("last", step, state, {})
                window, window_start = [], time.perf_counter()
            if step == total:
                break
            if stop.is_asked(step):
                _settle(window, pending, system, saved)
                if step not in saved.steps("last"):
                    saved.save("last", step, state, {})
                raise Preempted(f"stopped by SIGTERM; saved at step {step} of {total}: "
                                "the same command continues from there")
            state, fresh = iterate(system, state, step, per_epoch, functools.partial(batch_of, step))
            pending = _settle(window, pending, system, saved) or (step + 1, fresh)
    return state


def iterate(system: System, state: State, step: int, per_epoch: int, batch_of: Callable[[str], Batch]
            ) -> tuple[State, dict[str, jax.Array]]:
    """One iteration: every step whose turn it is.

    Args:
        system: what is trained.
        state: is donated.
        step: number of the iteration.
        per_epoch: iterations of an epoch.
        batch_of: stream -> its batch of this iteration.
    Returns:
        The new state, and the metrics under "STEP/NAME".
    """
    metrics, batches, ready = {}, {}, {}
    for update in system.steps:
        if step % update.every:
            continue
        source = update.inputs
        if source.batch not in batches:
            batches[source.batch] = batch_of(source.batch)
        if source not in ready:
            ready[source] = update.prepare(state, batches[source.batch], source)
        state, values = update.update(state, ready[source])
        metrics |= {f"{update.name}/{k}": v for k, v in values.items()}
    state = _count(state)
    for length, change in system.every.items():
        if (step + 1) % max(units.steps(length, per_epoch, system.length), 1) == 0:
            state = change(state)
    return state, metrics


def _count(state: State) -> State:
    return state.replace(step=_next(state.step))


_next = jax.jit(lambda step: step + 1, donate_argnums=0)


def _begin(config: ConfigDict, system: System, saved: Checkpoints, metrics: log.Metrics, mesh) -> tuple[State, bool]:
    """The state to go on from, and whether it is a new one."""
    state = saved.restore_newest(abstract_state(system, mesh), console.warn)
    is_new = state is None
    if is_new:
        state = system.init(rng.key(config.seed, "init"))
    step = int(state.step)
    metrics.cut_back(-1 if is_new else step)
    if step:
        if step not in saved.steps("last"):  # it was the best one
            saved.save("last", step, state, {})
        console.say(f"continuing from the checkpoint of step {step}")
    return state, is_new


def _settle(window: list[dict[str, Any]], pending: tuple[int, dict[str, jax.Array]] | None, system: System,
            saved: Checkpoints) -> None:
    """Fetches the metrics of an iteration that has been dispatched and not looked at, checks them and adds them to the
    window."""
    if pending is not None:
        step, values = pending[0], meshes.fetch_replicated(pending[1])
        _check_finite(step, system, values, saved)
        window.append({k: v for k, v in values.items() if not k.endswith("non_finite")})


def _due(config: ConfigDict, step: int, per_epoch: int, total: int) -> tuple[str, ...]:
    """What is to be done before iteration `step`.

    Each of them ends a window of the log, so that a resumed run writes the same lines, but for the one window that
    SIGTERM cuts in two: its line is of the iterations after the resumption.
    """
    def falls(name):
        every = units.steps(config.train[name], per_epoch, total, f"train.{name}")
        return step == total or (every > 0 and step % every == 0)

    if step == 0 < total:
        return ("eval",) if config.train.criteria else ()
    due = tuple(name for name in ("eval", "save") if falls(f"{name}_every"))
    return due or (("log",) if falls("log_every") else ())


def _select_best(config: ConfigDict, step: int, state: State, rates: Rates, more: Mapping[str, float], best: Rates,
                 may_be_best: bool, metrics: log.Metrics, saved: Checkpoints) -> Rates:
    """Writes what was measured. Keeps the state if it may be the best and its rates are above `best`, and returns the
    better ones."""
    ra, sa = rates
    metrics.write(step, config.train.select_on, {"sa": sa, "ra": ra, **more})
    if better := may_be_best and rates > best:
        saved.save("best", step, state, {"sa": sa, "ra": ra})
    others = "".join(f"; {name.partition('/')[2]} {100 * rate:.2f} %" for name, rate in more.items() if "/" in name)
    console.say(f"step {step}: {config.train.select_on} SA {100 * sa:.2f} %, RA {100 * ra:.2f} % "
            f"by {config.train.select_attack}{others}{', best so far' if better else ''}")
    return rates if better else best


def _check_finite(step: int, system: System, values: dict[str, Any], saved: Checkpoints) -> None:
    for update in system.steps:
        index = int(values.get(f"{update.name}/non_finite", -1))  # it may not have run in this iteration
        if index >= 0:
            steps = saved.steps("last")
            good = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
            raise NonFiniteError(f"step {step}: {update.tensors[index]} of the {update.name} update is not finite; "
                                 f"{good}. Try a lower learning rate, a warm-up or optim.*.clip_norm=1")


def _watch(model: Model, means: dict[str, Any], batch_size: int, iterations: int, told: dict[str, tuple[str, ...]]
           ) -> dict[str, tuple[str, ...]]:
    """Warns of what is wrong by the metrics and was not told before; returns what has been told of each update."""
    wrong = {name: model.watch(values, batch_size, iterations) for name, values in log.by_update(means)}
    for name, sentences in wrong.items():
        for sentence in sentences:
            if sentence not in told.get(name, ()):
                console.warn(f"{name}: {sentence}")
    return told | wrong
