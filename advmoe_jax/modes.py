"""What the program does in each mode: train, evaluate, report."""

import argparse
import glob
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import advmoe_jax
from advmoe_jax.attacks import parse, suites, verdicts
from advmoe_jax.attacks.suites import Suite
from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import xla
from advmoe_jax.core.errors import UnreliableError, UserError, one_of
from advmoe_jax.data import split as splits
from advmoe_jax.models import macs
from advmoe_jax.report import reports, results
from advmoe_jax.systems.assemble import Experiment, assemble
from advmoe_jax.train import checkpoint, evaluate, log, loop, preemption
from advmoe_jax.train import state as states


def start(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Runs the mode that the flags name."""
    if flags.mode == "report":
        if flags.config or flags.checkpoint or overrides:
            raise UserError("--mode report shows what was measured: expected --workdir and no other flag")
        folders = sorted(Path(p) for pattern in flags.workdir.split(",") for p in glob.glob(pattern))
        if not folders:
            raise UserError(f"no workdir matches {flags.workdir!r}: expected --workdir 'runs/*', for example")
        reports.write(folders)
        return
    if flags.checkpoint and flags.mode != "evaluate":
        raise UserError(f"--checkpoint is for --mode evaluate: expected no such flag with --mode {flags.mode}")
    if flags.checkpoint and not flags.checkpoint.isdigit():
        one_of("checkpoint", flags.checkpoint, ("best", "last"))
    config, workdir = _config(flags, overrides)
    with preemption.stops(), meshes.cluster(flags.coordinator, flags.num_processes, flags.process_id):
        chosen = _suites(config)
        experiment = assemble(config)
        if flags.mode == "train":
            _train(experiment, workdir)
        which = (flags.checkpoint,) if flags.checkpoint else ("best", "last")
        reliable = _evaluate(experiment, workdir, chosen, which, trust=flags.mode == "train")
        if jax.process_index() == 0:
            reports.write([workdir])
        if flags.strict and not reliable:
            raise UnreliableError("the evaluation is unreliable: its report says why")


def _config(flags: argparse.Namespace, overrides: list[str]) -> tuple[ConfigDict, Path]:
    """The config and the workdir; a workdir of another config is refused."""
    stored = Path(flags.workdir) / "config.json" if flags.workdir else None
    if flags.config:
        config = configs.load(flags.config)
    elif flags.mode == "evaluate" and stored:
        if not stored.exists():
            raise UserError(f"no run in {flags.workdir}: it has no config.json")
        config = configs.read(stored)
    else:
        raise UserError("--config is missing: expected for example --config configs/digits_r18.py, or --mode evaluate "
                        "with the --workdir of a run")
    for text in overrides:
        configs.override(config, text)
    configs.check(config)
    workdir = Path(flags.workdir or f"runs/{config.name}")
    standing = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
    if not standing.is_dir():
        raise UserError(f"--workdir {workdir}: {standing} is a file: expected a folder, or a name that is free")
    if (workdir / "config.json").exists():
        changed = configs.differences(config, configs.read(workdir / "config.json"))
        if changed:
            raise UserError(f"{workdir} holds a run of another config: {', '.join(changed)}; "
                            "choose another --workdir, or the config that it was started with")
    elif flags.mode == "evaluate":
        raise UserError(f"no run in {workdir}: it has no config.json")
    return config, workdir


def _suites(config: ConfigDict) -> tuple[Suite, ...]:
    """What `config.eval` asks for, the rest being as in training. The attack of `config.train` is checked too."""
    parse.attacks(config.train.attack, norm=config.attack.norm, eps=config.attack.eps)
    norm, budgets = config.eval.norm or config.attack.norm, config.eval.eps or config.attack.eps
    chosen = []
    for eps in map(str.strip, budgets.split(",")):
        chosen += ([suites.together(config.eval.suite, norm, eps)] if config.eval.suite
                   else suites.alone(config.eval.attacks, norm, eps))
    return tuple(chosen)


def _train(experiment: Experiment, workdir: Path) -> None:
    """Trains to the end; a finished run returns at once."""
    config = experiment.config
    if jax.process_index() == 0 and not (workdir / "config.json").exists():
        configs.write(config, workdir / "config.json")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir")
    _prepare()
    devices, batch = jax.device_count(), config.data.batch_size
    cost = macs.count(experiment.system.network)
    log.say(f"{experiment.system.describe} in {workdir} | advmoe_jax {advmoe_jax.__version__} | "
            f"{jax.process_count()} process(es), {devices} {jax.default_backend()} device(s), "
            f"batch {batch} ({batch // devices} a device) | MACs pathway {cost['pathway']:,} router {cost['router']:,} "
            f"total {cost['total']:,}{_dispatch(experiment.system.network)}")
    if config.train.select_on == "test":
        log.warn("train.select_on=test: the best checkpoint is chosen on test images, which is optimistic")
    loop.run(config, workdir, experiment.system, experiment.train, experiment.select, experiment.mesh)


def _log_in(folder: Path, about: dict[str, Any]) -> results.FileLog:
    """The log of an evaluation; process 0 puts the folder in order before others look."""
    first = jax.process_index() == 0
    kept = results.FileLog(folder, about) if first else None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("log")
    return kept or results.FileLog(folder, about, writes=False)


def _prepare() -> None:
    """What is set once the devices are known."""
    xla.use_compilation_cache()
    xla.keep_memory()


def _dispatch(network) -> str:
    kind = network.module.dispatch.kind
    return f" | experts: model.dispatch={kind}" if network.num_experts > 1 else ""


def _evaluate(experiment: Experiment, workdir: Path, suites: tuple[Suite, ...], which: tuple[str, ...],
              trust: bool) -> bool:
    """Attacks checkpoints on the test images and writes what came out.

    Args:
        experiment: what was trained.
        workdir: holds the checkpoints; gets results.json.
        suites: the attacks.
        which: checkpoints, "best", "last" or a step.
        trust: whether measurements of the step that are there already are known to be of this model.
    Returns:
        Whether the results can be trusted.
    """
    config, system = experiment.config, experiment.system
    _prepare()
    indices = np.arange(len(experiment.test))[:config.eval.n or None]
    abstract = loop.abstract_state(system, experiment.mesh)
    done = {(e["id"], e["step"]): e["unreliable"] for e in results.read(workdir)}
    reliable = True
    saved = checkpoint.open_checkpoints(workdir, create=False)
    by_step: dict[int, list[str]] = {}
    everywhere = {
        "seed": config.eval.seed, "train_seed": config.seed, "config": config.name, "method": system.describe,
        "selected_on": config.train.select_on, "data": config.data.name, "macs": macs.count(system.network),
        "precision": {"verdicts": "float32", "attacks": jax.config.jax_default_matmul_precision or "default"},
        "backend": jax.default_backend(), "n": len(indices),
        "versions": {"advmoe_jax": advmoe_jax.__version__, "jax": jax.__version__}}
    images = {"images": splits.fingerprint(experiment.test, indices)[:16],
              "versions": everywhere["versions"], "backend": everywhere["backend"]}
    try:
        for name in which:
            by_step.setdefault(saved.step(name), []).append(name)
        for step, names in by_step.items():
            common = everywhere | {"step": step}
            todo = []
            for suite in suites:
                ids = [results.entry_id(common | {"checkpoint": name, "attack": suite.name, "norm": suite.norm,
                                                  "eps": suite.eps, "settings": suite.settings}) for name in names]
                known = all((entry, step) in done for entry in ids)
                if trust and known:
                    reliable &= not done[ids[0], step]
                else:
                    todo.append((suite, ids[0], known))
            if not todo:
                continue
            state = saved.restore(names[0], abstract)
            about = images | {"step": step, "weights": states.fingerprint(state)[:16]}
            noticed, earlier = None, ()
            for suite, entry, known in todo:
                what = f"the {' and '.join(names)} checkpoint (step {step}) on {len(indices)} test images: {suite.name}"
                folder = workdir / "eval" / entry
                if known and results.is_about(folder, about):
                    log.say(f"measured before, {what}; delete {folder} to measure it again")
                    reliable &= not done[entry, step]
                    continue
                if noticed is None:
                    noticed = evaluate.suspicions(system, state, experiment.test, indices, mesh=experiment.mesh,
                                                  seed=config.eval.seed)
                log.say(f"attacking {what}{_dispatch(system.network)}")
                kept = _log_in(folder, about)
                found = evaluate.run(
                    system, state, experiment.test, indices, suite, mesh=experiment.mesh,
                    batch_size=config.eval.batch_size, seed=config.eval.seed, log=kept)
                record = common | evaluate.summarize(found, suite, system.network.num_experts, noticed, earlier)
                earlier += found.attempts
                reliable &= not record["unreliable"]
                for flag in record["flags"]:
                    (log.alarm if flag["unreliable"] else log.warn)(
                        f"{'evaluation UNRELIABLE' if flag['unreliable'] else 'note'}: {flag['reason']}")
                if jax.process_index() == 0:
                    adversarial = verdicts.adversarial(found, kept)
                    for name in names:
                        results.keep(workdir, {"checkpoint": name} | record, found, adversarial)
                    kept.finish()
    finally:
        saved.close()
    return reliable
