"""The runs of a recipe, carried out by one process, or by several at once that share its folder."""

import time
import traceback

import jax
from etils import epath

from advmoe_jax import run as runs
from advmoe_jax.core import console, locks, status, stop, tables
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import NoSpace, Preempted, UserError
from advmoe_jax.core.recipe import Planned

_LOOKS, _PAUSE = 20, 0.25  # at signals, and the seconds between, before a look at what other processes have finished


def carry_out(taken: list[Planned], is_to_wait: bool) -> tuple[bool, list[str]]:
    """Trains and evaluates what is left to do, until nothing more can be done by this process.

    A run waits for those that it needs; one that fails does not stop those that do not need it, unless it fails in one
    process of a cluster alone; one that another process holds is left alone. With `is_to_wait` there is more to do as
    long as another process holds one: what needs it when it is finished, and itself when that process is gone.

    Returns:
        Whether all evaluations can be trusted; and the names of the runs that failed in this process.
    """
    reliable, failed, done, held, told = True, [], set(), set(), ""
    while True:
        others = _held_by_others(taken)  # before the states: what they finish after this look, the next one sees
        ready = [run for run in taken if run.name not in done | held | set(failed) and all(
            meshes.agree(status.read(run.workdir.parent / need).is_trained) for need in run.needs)]
        if not ready:
            if not (is_to_wait and meshes.agree(bool(others or held))):
                break
            told = _wait(others, told)
            held.clear()
            continue
        run = ready[0]
        if meshes.agree(status.read(run.workdir).state == "finished"):
            reliable &= runs.was_reliable(run.workdir)
            done.add(run.name)
            continue
        if meshes.agree(locks.holder(run.workdir) is not None):
            held.add(run.name)
            continue
        try:
            reliable &= runs.train(run.config, run.workdir)
            done.add(run.name)
            held.clear()  # they may be free by now
        except locks.Held:
            held.add(run.name)
        except (Preempted, NoSpace):
            raise
        except Exception as error:
            if not meshes.all_come(f"{run.name} failed"):
                raise
            failed.append(run.name)
            why = f" {error}" if isinstance(error, UserError) else f"\n{traceback.format_exc()}"
            console.alarm(f"{run.name} failed:{why}")
        jax.clear_caches()  # every run compiles programs of its own
    for run in taken:
        if run.name not in done | set(failed):
            waits = [need for need in run.needs if not status.read(run.workdir.parent / need).is_trained]
            if holder := _holder(run.workdir):
                console.say(f"{run.name}: left to {holder}")
            elif waits:
                console.say(f"{run.name}: waits for {', '.join(waits)}")
    return reliable, failed


def _held_by_others(taken: list[Planned]) -> str:
    """"base (process 12 on host-a), nis-1 (process 9 on host-b)": which of the runs, and of those that they need, other
    processes hold."""
    names = dict.fromkeys(name for run in taken for name in (*run.needs, run.name))
    folders = {run.workdir.parent for run in taken}
    return ", ".join(f"{name} ({holder})" for folder in folders for name in names if (holder := _holder(folder / name)))


def _wait(others: str, told: str) -> str:
    """Waits a moment for what other processes hold; says so when it is not what was told last, and returns it."""
    if others and others != told:
        console.say(f"waits for {others}")
    for _ in range(_LOOKS):
        stop.check()
        time.sleep(_PAUSE)
    return others


def _holder(workdir: epath.Path) -> str:
    """"process 12 on host-a", which trains or evaluates a run; empty if none does."""
    holder = locks.holder(workdir)
    return f"process {holder['pid']} on {holder['host']}" if holder else ""


def states(planned: list[Planned]) -> tables.Table:
    """State, needs and time of each run."""
    rows = []
    for run in planned:
        of, holder = status.read(run.workdir), _holder(run.workdir)
        state = f"{of.state}: {of.why}" if of.why else "stopped" if of.state == "training" and not holder else of.state
        if holder:
            state = f"running, {holder}"
        rows.append((run.name, state, ", ".join(run.needs), tables.duration(of.seconds) if of.seconds else ""))
    return tables.Table("Runs", ("run", "state", "needs", "time"), rows)
