"""One run: trained, evaluated, reported."""

import contextlib
import time
from collections.abc import Collection, Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import advmoe_jax
from advmoe_jax.core import cache, console, files, locks, paths, status, xla
from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import NoSpace, Preempted, UserError
from advmoe_jax.evaluation import evaluate as evaluation
from advmoe_jax.evaluation import results
from advmoe_jax.evaluation.plan import Checkpoint
from advmoe_jax.interop import exported
from advmoe_jax.report import reports
from advmoe_jax.systems.assemble import Experiment, assemble
from advmoe_jax.train import checkpoint, ema, loop, weights

_OWN = ("checkpoints", "config.json", "eval", "export", "metrics.jsonl", "pruning.json", "report.md", "results.json",
        "status.json", "team.json")


def _all(config: ConfigDict, workdir: epath.Path) -> tuple[str, ...]:
    """The checkpoints that are evaluated unless one is named; of an export the one that it is of."""
    if weights.is_in(workdir):
        return (weights.origin(workdir).checkpoint,)
    return tuple(name for name in checkpoint.NAMES if name != ema.NAME or config.train.ema)


def check_workdir(config: ConfigDict, workdir: epath.Path, exists: bool) -> None:
    """Raises UserError for a workdir of another config or of other things, or one that is not there and should be.

    A run of which nothing is saved may begin anew with another config, unless it `exists` for an evaluation.
    """
    if paths.is_remote(workdir):
        files.check_rights(paths.path(workdir), "--workdir")
    else:
        standing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        if not standing.is_dir():
            raise UserError(f"--workdir {workdir}: {standing} is a file: expected a folder, or a name that is free")
    written, saved = workdir / "config.json", checkpoint.metas(workdir)
    known = {folder: configs.from_json(meta["config"], folder) for folder, meta in saved.items() if "config" in meta}
    if written.exists():
        stored = configs.read(written)
        if saved or exists or results.is_kept(workdir):
            known = {written: stored} | known
    elif exists:
        raise UserError(f"no run in {workdir}: it has no config.json")
    elif not saved:
        refuse_foreign(workdir, _OWN)
    if not exists and weights.is_in(workdir):
        raise UserError(f"{workdir} holds an exported model: expected another --workdir; a run starts from this one by "
                        "init_from")
    for stored in known.values():
        if changed := configs.differences(config, stored):
            raise UserError(f"{workdir} holds a run of another config: {', '.join(changed)}; "
                            "choose another --workdir, or the config that it was started with")
    for folder, meta in saved.items():
        if meta.get("step", int(folder.name)) != int(folder.name):
            raise UserError(f"{folder} holds the checkpoint of step {meta['step']}: expected it under its own name, or "
                            "none; move it away")


def refuse_foreign(workdir: epath.Path, own: Collection[str]) -> None:
    """Raises UserError if a folder holds anything, hidden files apart, that has another name."""
    names = sorted(path.name for path in workdir.iterdir()) if workdir.is_dir() else []
    if foreign := [name for name in names if name not in own and not name.startswith(".")]:
        raise UserError(f"--workdir {workdir} holds {foreign[0]}, and no run or recipe: expected a folder that is new, "
                        "empty, or of this run or recipe")


def train(config: ConfigDict, workdir: epath.Path) -> bool:
    """Trains to the end, then evaluates and reports; what is finished returns at once.

    Returns:
        Whether the evaluation can be trusted.
    Raises:
        UserError: everything impossible, before the first step; or another process holds the workdir.
    """
    experiment = assemble(config, workdir=workdir)
    evaluation.check(_subject(experiment, workdir))
    with _held(workdir):
        check_workdir(config, workdir, exists=False)
        if jax.process_index() == 0:
            checkpoint.remove_unfinished(workdir)
            files.remove_leftovers(workdir)
        begin, was_trained = time.time(), status.read(workdir).is_trained
        try:
            _train(experiment, workdir)
        except NoSpace:
            raise
        except UserError as error:
            state, why = ("training", "") if isinstance(error, Preempted) else ("failed", str(error))
            if not was_trained:
                _set_status(workdir, state, time.time() - begin, why)
            raise
        if not was_trained:
            _set_status(workdir, "trained", time.time() - begin)
        return _evaluate(experiment, workdir, _all(config, workdir), trust=True)


def was_reliable(workdir: epath.Path) -> bool:
    """Whether all that was measured of a run can be trusted."""
    return not any(entry["unreliable"] for entry in results.read(workdir))


def evaluate(config: ConfigDict, workdir: epath.Path, which: tuple[str, ...] = ()) -> bool:
    """Evaluates checkpoints of a run and reports; returns whether the results can be trusted."""
    experiment = assemble(config, starts=False)
    evaluation.check(_subject(experiment, workdir))
    return _evaluate(experiment, workdir, which or _all(config, workdir), trust=False)


@contextlib.contextmanager
def _held(folder: epath.Path) -> Iterator[None]:
    """The lock of a folder, which one process of a cluster takes for all, or all are refused."""
    with contextlib.ExitStack() as stack:
        refused = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(locks.hold(folder))
            except locks.Held as error:
                refused = error
        if meshes.agree(refused is not None):
            raise refused or locks.Held(f"{folder} is in use by another process")
        yield


def _set_status(workdir: epath.Path, state: str, seconds: float = 0.0, why: str = "") -> None:
    if jax.process_index() == 0:
        status.write(workdir, state, seconds, why)


def _train(experiment: Experiment, workdir: epath.Path) -> None:
    config, system = experiment.config, experiment.system
    written = workdir / "config.json"
    if jax.process_index() == 0 and not (written.exists() and not configs.differences(config, configs.read(written))):
        configs.write(config, written)
    if jax.process_index() == 0:
        for name, content in system.files.items():
            files.write_json(workdir / name, content)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")
    if status.read(workdir).state in ("new", "failed"):
        _set_status(workdir, "training")
    _prepare()
    devices, batch, cost = jax.device_count(), config.data.batch_size, system.model.costs()
    console.say(" | ".join(filter(None, (
        f"{system.describe} in {workdir}", f"advmoe_jax {advmoe_jax.__version__}",
        f"{jax.process_count()} process(es), {devices} {jax.default_backend()} device(s)",
        f"batch {batch} ({batch // devices} a device)",
        f"MACs pathway {cost['pathway']:,} router {cost['router']:,} total {cost['total']:,}", system.model.about))))
    if config.train.select_on == "test":
        console.warn("train.select_on=test: the best checkpoint is chosen on test images, which is optimistic")
    if batch == 1 and any(spec.norm for spec in system.model.layers):
        console.warn("data.batch_size=1: BatchNorm normalises every image by itself, which leaves routers nothing to "
                     "choose by: expected 2 or more images, better 32")
    loop.run(config, workdir, system, experiment.data.train, experiment.select, experiment.mesh, experiment.criteria)


def _evaluate(experiment: Experiment, workdir: epath.Path, which: tuple[str, ...], trust: bool) -> bool:
    _prepare()
    begin = time.time()
    while True:
        try:
            reliable = _evaluate_saved(experiment, workdir, which, trust)
            break
        except checkpoint.Gone:  # training goes on; what was measured is kept, and the newer ones are taken
            if jax.process_count() > 1:
                raise
    if status.read(workdir).state == "trained":
        _set_status(workdir, "finished", time.time() - begin)
    if jax.process_index() == 0:
        reports.write_run(workdir)
    return reliable


def _evaluate_saved(experiment: Experiment, workdir: epath.Path, which: tuple[str, ...], trust: bool) -> bool:
    subject = _subject(experiment, workdir)
    shapes, replicated = subject.model.shapes, meshes.replicated(experiment.mesh)
    with checkpoint.opened(workdir, create=False) as saved:
        names: dict[tuple[int, bool], list[str]] = {}
        for name in which:
            names.setdefault((saved.step(name), name == ema.NAME), []).append(name)
        checkpoints = [Checkpoint(step, tuple(same)) for (step, _), same in names.items()]
        with _held(workdir / "eval"):
            return evaluation.evaluate(
                subject, checkpoints, lambda name: saved.restore_trained(name, shapes, replicated), trust=trust)


def _subject(experiment: Experiment, workdir: epath.Path) -> evaluation.Subject:
    system = experiment.system
    model = exported.of(system.model, workdir)
    return evaluation.Subject(experiment.config, workdir, model, system.describe, experiment.data.test,
                              experiment.mesh)


def _prepare() -> None:
    """What is set once the devices are known."""
    cache.use()
    xla.keep_memory()
