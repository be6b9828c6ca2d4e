"""One run: trained, evaluated, reported."""

import contextlib
import time

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import advmoe_jax
from advmoe_jax.core import config as configs
from advmoe_jax.core import console, locks, paths, status, xla
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import EXIT_PREEMPTED, UserError
from advmoe_jax.evaluation import evaluate as evaluation
from advmoe_jax.evaluation import results
from advmoe_jax.evaluation.plan import Checkpoint
from advmoe_jax.report import reports
from advmoe_jax.systems.assemble import Experiment, assemble
from advmoe_jax.train import checkpoint, ema, loop


def _all(config: ConfigDict) -> tuple[str, ...]:
    """The checkpoints that are evaluated unless one is named."""
    return ("best", "last", ema.NAME) if config.train.ema else ("best", "last")


def check_workdir(config: ConfigDict, workdir: epath.Path, exists: bool) -> None:
    """Raises UserError for a workdir of another config, or one that is not there and should be."""
    if paths.is_remote(workdir):
        paths.path(workdir)
    else:
        standing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        if not standing.is_dir():
            raise UserError(f"--workdir {workdir}: {standing} is a file: expected a folder, or a name that is free")
    if (workdir / "config.json").exists():
        changed = configs.differences(config, configs.read(workdir / "config.json"))
        if changed:
            raise UserError(f"{workdir} holds a run of another config: {', '.join(changed)}; "
                            "choose another --workdir, or the config that it was started with")
    elif exists:
        raise UserError(f"no run in {workdir}: it has no config.json")


def train(config: ConfigDict, workdir: epath.Path) -> bool:
    """Trains to the end, then evaluates and reports; what is finished returns at once.

    Returns:
        Whether the evaluation can be trusted.
    Raises:
        UserError: everything impossible, before the first step; or another process holds the workdir.
    """
    experiment = assemble(config)
    evaluation.check(_subject(experiment, workdir))
    with _held(workdir):
        check_workdir(config, workdir, exists=False)
        begin, was_trained = time.time(), status.read(workdir).is_trained
        try:
            _train(experiment, workdir)
        except UserError as error:
            state, why = ("training", "") if error.exit_code == EXIT_PREEMPTED else ("failed", str(error))
            _set_status(workdir, state, time.time() - begin, why)
            raise
        if not was_trained:
            _set_status(workdir, "trained", time.time() - begin)
        return _evaluate(experiment, workdir, _all(config), trust=True)


def was_reliable(workdir: epath.Path) -> bool:
    """Whether all that was measured of a run can be trusted."""
    return not any(entry["unreliable"] for entry in results.read(workdir))


def evaluate(config: ConfigDict, workdir: epath.Path, which: tuple[str, ...] = ()) -> bool:
    """Evaluates checkpoints of a run and reports; returns whether the results can be trusted."""
    experiment = assemble(config, starts=False)
    evaluation.check(_subject(experiment, workdir))
    return _evaluate(experiment, workdir, which or _all(config), trust=False)


def _held(folder: epath.Path):
    """The lock of a folder, which one process of a cluster takes for all."""
    return locks.hold(folder) if jax.process_index() == 0 else contextlib.nullcontext()


def _set_status(workdir: epath.Path, state: str, seconds: float = 0.0, why: str = "") -> None:
    if jax.process_index() == 0:
        status.write(workdir, state, seconds, why)


def _train(experiment: Experiment, workdir: epath.Path) -> None:
    config, system = experiment.config, experiment.system
    if jax.process_index() == 0 and not (workdir / "config.json").exists():
        configs.write(config, workdir / "config.json")
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
    loop.run(config, workdir, system, experiment.data.train, experiment.select, experiment.mesh)


def _evaluate(experiment: Experiment, workdir: epath.Path, which: tuple[str, ...], trust: bool) -> bool:
    subject = _subject(experiment, workdir)
    _prepare()
    shapes, replicated = subject.model.shapes, meshes.replicated(experiment.mesh)
    begin = time.time()
    with checkpoint.opened(workdir, create=False) as saved:
        names: dict[tuple[int, bool], list[str]] = {}
        for name in which:
            names.setdefault((saved.step(name), name == ema.NAME), []).append(name)
        checkpoints = [Checkpoint(step, tuple(same)) for (step, _), same in names.items()]
        with _held(workdir / "eval"):
            reliable = evaluation.evaluate(
                subject, checkpoints, lambda name: saved.restore_trained(name, shapes, replicated), trust=trust)
    if status.read(workdir).state == "trained":
        _set_status(workdir, "finished", time.time() - begin)
    if jax.process_index() == 0:
        reports.write_run(workdir)
    return reliable


def _subject(experiment: Experiment, workdir: epath.Path) -> evaluation.Subject:
    system = experiment.system
    return evaluation.Subject(experiment.config, workdir, system.model, system.describe, experiment.data.test,
                              experiment.mesh)


def _prepare() -> None:
    """What is set once the devices are known."""
    xla.use_compilation_cache()
    xla.keep_memory()
