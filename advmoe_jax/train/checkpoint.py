"""Checkpoints: the newest ones, and beside them the best one. The only file that knows orbax.

Two managers, since one that keeps the best by a metric forgets the newest.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from advmoe_jax.core import files, paths, tree
from advmoe_jax.core.errors import UserError, first_line, one_of
from advmoe_jax.ops import masks as masking
from advmoe_jax.train import ema, weights
from advmoe_jax.train.state import State, Trained
from advmoe_jax.train.weights import Weights

NAMES = ("best", "last", ema.NAME)

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it then raises


class Gone(UserError):
    """A checkpoint went away while it was read, since the run saved newer ones."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a workdir. Open with `open_checkpoints`, end with `close`.

    Attributes:
        last: keeps the two newest.
        best: keeps the one that was saved last, which the caller chose.
        about: {name: what JSON holds} that is kept beside every state.
    """

    last: ocp.CheckpointManager
    best: ocp.CheckpointManager
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, which: str, step: int, state: State, meta: dict[str, Any]) -> None:
        """Saves to "last" or "best", whole or not at all; every process calls it.

        Args:
            which: "last" or "best".
            step: of the state.
            state: all of it.
            meta: {name: what JSON holds}, kept beside it with the step and with `about`.
        Raises:
            NoSpace: the disk is full; what was saved before is there.
        """
        manager, arguments = getattr(self, which), dict(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"step": step} | self.about | meta))
        with files.room(manager.directory / str(step), sum(leaf.nbytes for leaf in jax.tree.leaves(state))):
            manager.save(step, args=ocp.args.Composite(**arguments), force=True)

    def steps(self, which: str) -> list[int]:
        """Saved steps, oldest first."""
        return sorted(getattr(self, which).all_steps())

    def restore_newest(self, abstract: State, warn) -> State | None:
        """The newest state of "last" that can be read; unreadable ones are skipped with a warning. If "last" is empty,
        that of "best".

        What is newer than the state that was read is deleted, in "best" too: the run will come to it again.

        Raises:
            UserError: none can be read, it is of another architecture, or there is no memory for it on these devices;
                nothing is deleted.
        """
        state, restored = None, -1
        source = self.last if self.steps("last") else self.best
        for step in sorted(source.all_steps(), reverse=True):
            try:
                state, restored = _read(source, step, abstract), step
                break
            except UserError:
                raise
            except Exception as error:  # orbax raises whatever its storage raised
                _check_memory(error, source, step, abstract)
                warn(f"checkpoint {step} cannot be read and is skipped: {_first_line(error)}")
        if state is None and source.all_steps():
            raise UserError(f"no checkpoint in {source.directory} can be read: "
                            "expected one that can; to train from the start choose another --workdir")
        for manager in (self.last, self.best):
            for step in manager.all_steps():
                if step > restored:
                    manager.delete(step)
        return state

    def best_rates(self) -> tuple[float, float]:
        """(RA, SA) with which the best checkpoint was saved; below every rate if there is none that can be read."""
        try:
            wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
            meta = self.best.restore(self.steps("best")[-1], args=wanted)["meta"]
            return meta["ra"], meta["sa"]
        except Exception:  # orbax raises whatever its storage raised
            return -1.0, -1.0

    def step(self, which: str) -> int:
        """The step of a checkpoint.

        Args:
            which: "last", "best", "ema", which is the average in the last, or a step number.
        Raises:
            UserError: there is none.
        """
        if which.isdigit():
            saved = sorted({*self.steps("last"), *self.steps("best")})
            if int(which) not in saved:
                raise UserError(f"no checkpoint of step {which}: "
                                f"expected one of {saved or 'none saved yet'}, best or last")
            return int(which)
        which = "last" if which == ema.NAME else one_of("checkpoint", which, NAMES)
        steps = self.steps(which)
        if not steps:
            raise UserError(f"no {which} checkpoint in {getattr(self, which).directory}: train first")
        return steps[-1]

    def restore_trained(self, which: str, abstract: dict[str, Any], sharding: jax.sharding.Sharding | None = None
                        ) -> Trained:
        """What was trained, without the state of optimizers.

        Args:
            which: as for `step`.
            abstract: {"params": ..., "batch_stats": ...} shapes of the model's variables.
            sharding: of the arrays; None: numpy.
        Raises:
            Gone: it went away.
            UserError: there is none, it cannot be read, or it is of another architecture.
        """
        step = self.step(which)
        manager = self.best if which == "best" or step not in self.last.all_steps() else self.last
        folder = manager.directory / str(step) / "state"
        try:
            _check_storage(folder)
            _check_architecture(manager, step, abstract["params"])
            found = _read_arrays(folder, of_average=which == ema.NAME)
        except UserError:
            raise
        except Exception as error:  # orbax raises whatever its storage raised
            _check_memory(error, manager, step, abstract)
            before = manager.all_steps()
            manager.reload()
            kind = UserError if manager.all_steps() == before else Gone
            raise kind(f"checkpoint {manager.directory}/{step} cannot be read: {_first_line(error)}") from None
        for group, masks in (found.get("masks") or {}).items():  # a run may zero what goes now and then
            found["params"][group] = jax.tree.map(np.asarray, masking.apply(found["params"][group], masks))
        # An empty tree is no entry of a checkpoint.
        stats = {group: found.get("batch_stats", {}).get(group, {}) for group in found["params"]}
        trained = Trained({"params": found["params"], "batch_stats": stats}, found.get("masks") or {})
        try:
            return weights.placed(trained, sharding)
        except jax.errors.JaxRuntimeError as error:
            _check_memory(error, manager, step, abstract)
            raise

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        for manager in (self.last, self.best):
            with files.room(manager.directory / "0"):
                manager.wait_until_finished()

    def close(self) -> None:
        """Waits and closes."""
        self.wait()
        for manager in (self.last, self.best):
            manager.close()


@contextlib.contextmanager
def opened(workdir: epath.PathLike, create: bool = True, about: dict[str, Any] | None = None
           ) -> Iterator[Checkpoints | Weights]:
    """`open_checkpoints`, closed at the end; to read, also the weights of an export."""
    if not create and weights.is_in(workdir):
        yield Weights(epath.Path(workdir))
        return
    saved = open_checkpoints(workdir, create, about)
    try:
        yield saved
    finally:
        saved.close()


def metas(workdir: epath.PathLike) -> dict[epath.Path, dict[str, Any]]:
    """{folder of a checkpoint: what was saved beside its state}; {} where that cannot be read."""
    found = {}
    for folder in sorted((epath.Path(workdir) / "checkpoints").glob("*/*")):
        if folder.name.isdigit():
            try:
                found[folder] = dict(json.loads((folder / "meta" / "metadata").read_text()))
            except (OSError, ValueError, TypeError):
                found[folder] = {}
    return found


def remove_unfinished(workdir: epath.PathLike) -> None:
    """Removes what saves that were killed left. Nobody may be saving."""
    for folder in (epath.Path(workdir) / "checkpoints").glob("*/*.orbax-checkpoint-tmp*"):
        files.remove_folder(folder)


def open_checkpoints(workdir: epath.PathLike, create: bool = True, about: dict[str, Any] | None = None) -> Checkpoints:
    """Opens `workdir/checkpoints/last` and `workdir/checkpoints/best`.

    Args:
        workdir: of a run.
        create: whether to make them.
        about: as of Checkpoints.
    Raises:
        UserError: neither is there, and `create` is false.
    """
    workdir = epath.Path(workdir)
    where = workdir if paths.is_remote(workdir) else epath.Path(os.path.abspath(workdir))
    folders = [where / "checkpoints" / name for name in ("last", "best")]
    if not create and not any(folder.is_dir() for folder in folders):
        raise UserError(f"no best checkpoint and no last one in {workdir}: train first")
    # On CPU a state that is donated to the next step may be the very memory that an asynchronous save reads.
    options = [ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=jax.default_backend() != "cpu", create=create) for keep in (2, 1)]
    handlers = dict(state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
    with files.room(folders[0]):
        return Checkpoints(*(ocp.CheckpointManager(folder, options=of, item_handlers=handlers)
                             for folder, of in zip(folders, options)), about or {})


def _read(manager: ocp.CheckpointManager, step: int, abstract: State) -> State:
    _check_storage(manager.directory / str(step) / "state")
    _check_architecture(manager, step, abstract.params)
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]


def _read_arrays(folder, of_average: bool) -> dict[str, Any]:
    """Parameters, statistics and masks of a stored state as numpy, whatever devices wrote it."""
    with contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        stored = reader.metadata(folder).item_metadata.tree
        if of_average and not stored.get("extra", {}).get(ema.NAME):
            raise UserError(f"{folder} holds no average of the weights: expected a run with train.ema")
        names = ("extra", "masks") if of_average else ("params", "batch_stats", "masks")
        wanted = {name: stored[name] for name in names if stored.get(name)}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        found = reader.restore(folder, args=ocp.args.PyTreeRestore(
            item=jax.tree.map(lambda _: 0, wanted), restore_args=as_numpy, partial_restore=True))
    return found | found.pop("extra")[ema.NAME] if of_average else found


def _check_storage(folder):
    """Reads every stored value: a restore that fails halfway leaves tasks that complain when they are collected."""
    base = f"{folder}/" if paths.is_remote(folder) else {"driver": "file", "path": f"{folder}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for pending in [store.read(key) for key in store.list().result()]:
        pending.result()


def _check_architecture(manager, step, params):
    """Raises UserError naming the first parameter whose name or shape is not what the config's model has."""
    if different := tree.first_difference(params, manager.item_metadata(step)["state"].tree["params"]):
        name, ours, theirs = different
        raise UserError(f"checkpoint {manager.directory}/{step} is of another architecture: "
                        f"{name} is {theirs} there, the config's model has {ours}")


def _check_memory(error: BaseException, manager, step: int, abstract) -> None:
    """Raises UserError if a checkpoint could not be read for want of memory, which says nothing against it."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        raise UserError(f"checkpoint {manager.directory}/{step} does not fit: every device holds all of its {size:,} "
                        f"bytes, and there is no memory for them on these {jax.device_count()} devices "
                        f"({_first_line(error)}); expected devices with more of it, or nothing else on them") from None


def _first_line(error: Exception) -> str:
    return first_line(error)[:200]
