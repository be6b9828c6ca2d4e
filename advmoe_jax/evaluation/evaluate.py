"""An evaluation of a trained model: planned, run, kept."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import advmoe_jax
from advmoe_jax.core import console, files, tree
from advmoe_jax.data import split
from advmoe_jax.data.split import Split
from advmoe_jax.evaluation import black_box, eval_log, measure, plan, results, verdicts
from advmoe_jax.evaluation.plan import Checkpoint, Job
from advmoe_jax.models.model import Model, Variables


class Trained(Protocol):
    """What a checkpoint holds."""

    variables: Variables
    masks: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        config: of the run.
        workdir: gets results.json and eval/.
        model: as trained.
        describe: one line on how.
        test: images, of which the first `config.eval.n` count.
        mesh: of all devices.
    """

    config: ConfigDict
    workdir: epath.Path
    model: Model
    describe: str
    test: Split
    mesh: jax.sharding.Mesh

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self.test))[:self.config.eval.n or None]


def check(subject: Subject) -> None:
    """Raises UserError if the config asks for attacks that the model cannot take."""
    for suite in plan.asked(subject.config):
        measure.check(suite, subject.model)


def evaluate(subject: Subject, checkpoints: Sequence[Checkpoint], restore: Callable[[str], Trained], *,
             trust: bool) -> bool:
    """Attacks checkpoints on the test images and keeps what comes out.

    Args:
        subject: what is evaluated.
        checkpoints: which.
        restore: name -> the weights.
        trust: whether measurements that are there are known to be of this model.
    Returns:
        Whether the results can be trusted.
    """
    todo = plan.jobs(plan.asked(subject.config), checkpoints, results.read(subject.workdir), n=len(subject.rows),
                     seed=subject.config.eval.seed)
    left = [job for job in todo if not (trust and job.is_measured)]
    reliable = all(job.was_reliable for job in todo if job not in left)
    for checkpoint, jobs in itertools.groupby(left, key=lambda job: job.checkpoint):
        reliable &= _of_checkpoint(subject, restore(checkpoint.names[0]), list(jobs))
    return reliable


def _of_checkpoint(subject: Subject, trained: Trained, jobs: Sequence[Job]) -> bool:
    """Runs the jobs on one checkpoint; those that were done on the very same model and images are not repeated."""
    config, rows, weights = subject.config, subject.rows, trained.variables
    common = _circumstances(subject) | {"step": jobs[0].checkpoint.step}
    about = {
        "step": jobs[0].checkpoint.step, "weights": _hash(tree.named_leaves(weights)),
        "images": split.fingerprint(subject.test, rows)[:16],
        "versions": common["versions"], "backend": common["backend"]} | (
            {} if config.eval.black_box else {"black_box": False})
    reliable, noticed, earlier = True, None, ()
    for job in jobs:
        folder = subject.workdir / "eval" / job.entry
        what = f"{job.what} on {len(rows)} test images: {job.suite.name}"
        if job.is_measured and eval_log.is_about(folder, about):
            console.say(f"measured before, {what}; delete {folder} to measure it again")
            reliable &= job.was_reliable
            continue
        if noticed is None:
            noticed = measure.suspicions(subject.model, weights, subject.test, rows, mesh=subject.mesh,
                                         seed=config.eval.seed)
        console.say(" | ".join(filter(None, (f"attacking {what}", subject.model.about))))
        log = _open_log(folder, about)
        checks = black_box.checks(job.suite.specs, subject.model.surfaces) if config.eval.black_box else ()
        found = measure.run(subject.model, weights, subject.test, rows, job.suite, mesh=subject.mesh,
                            batch_size=config.eval.batch_size, seed=config.eval.seed, checks=checks, log=log)
        record = common | measure.summarize(found, job.suite, subject.model, noticed, earlier)
        record["macs"] = subject.model.costs(trained.masks, record["facts"])
        earlier += found.attempts
        reliable &= not record["unreliable"]
        _keep(subject.workdir, job, record, found, log)
    return reliable


def _keep(workdir: epath.Path, job: Job, record: dict[str, Any], found: verdicts.Found, log: eval_log.FileLog) -> None:
    for flag in record["flags"]:
        if flag["unreliable"]:
            console.alarm(f"evaluation UNRELIABLE: {flag['reason']}")
        else:
            console.warn(f"note: {flag['reason']}")
    if jax.process_index() == 0:
        adversarial, pictures = verdicts.adversarial(found, log), verdicts.pictures(found, log)
        for name in job.checkpoint.names:
            results.keep(workdir, {"checkpoint": name} | record, found, adversarial, pictures)
        log.finish()


def _circumstances(subject: Subject) -> dict[str, Any]:
    """What every record says of the run and of the machine."""
    config = subject.config
    return {
        "seed": config.eval.seed, "train_seed": config.seed, "config": config.name, "method": subject.describe,
        "selected_on": config.train.select_on, "data": config.data.name,
        "precision": {"verdicts": "float32", "attacks": jax.config.jax_default_matmul_precision or "default"},
        "backend": jax.default_backend(),
        "versions": {"advmoe_jax": advmoe_jax.__version__, "jax": jax.__version__}}


def _hash(leaves: Mapping[str, jax.Array]) -> str:
    return files.fingerprint({name: leaf.addressable_data(0) for name, leaf in leaves.items()})[:16]


def _open_log(folder: epath.Path, about: dict[str, Any]) -> eval_log.FileLog:
    """The log of an evaluation; process 0 puts the folder in order before others look."""
    log = eval_log.FileLog(folder, about) if jax.process_index() == 0 else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("log")
    return log or eval_log.FileLog(folder, about, writes=False)
