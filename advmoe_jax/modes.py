"""What the program does in each mode: train, evaluate, report, export; for one run or for those of a recipe."""

import argparse
import glob
import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
from etils import epath
from ml_collections import ConfigDict

import advmoe_jax
from advmoe_jax import recipes
from advmoe_jax import run as runs
from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import paths, recipe, status, stop, tables
from advmoe_jax.core.errors import UnreliableError, UserError, one_of
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.interop import export
from advmoe_jax.report import reports
from advmoe_jax.train import checkpoint


def start(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Runs the mode that the flags name. SIGTERM and Ctrl-C end it where nothing is lost."""
    with stop.noted():
        _start(flags, overrides)


def _start(flags: argparse.Namespace, overrides: list[str]) -> None:
    if flags.mode == "report":
        return report(flags, overrides)
    _check(flags)
    loaded = _load(flags)
    if isinstance(loaded, Recipe):
        if flags.mode == "export":
            raise UserError("--mode export is for one run: expected the --workdir of one, and no recipe")
        return of_recipe(flags, loaded, overrides)
    config = configs.checked(loaded, overrides)
    if flags.list_fields:
        return list_fields(config)
    if given := [name for name in ("list", "only", "wait") if getattr(flags, name)]:
        raise UserError(f"--{given[0]} is for a recipe: expected a --config with get_recipe, "
                        f"and {flags.config or 'this run'} is one run")
    workdir = paths.path(flags.workdir or f"runs/{config.name}")
    runs.check_workdir(config, workdir, exists=flags.mode != "train")
    if flags.mode == "export":
        export.export_run(config, workdir, flags.checkpoint)
        return
    with _cluster(flags, workdir, {"": config}):
        if flags.mode == "train":
            reliable = runs.train(config, workdir)
        else:
            reliable = runs.evaluate(config, workdir, *([(flags.checkpoint,)] if flags.checkpoint else []))
    _end(flags, reliable)


def report(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Reports one run, a recipe, or several runs beside each other."""
    if flags.config or flags.checkpoint or overrides:
        raise UserError("--mode report shows what was measured: expected --workdir and no other flag")
    folders = []
    for pattern in paths.listed(flags.workdir):
        folders += [pattern] if "://" in pattern or epath.Path(pattern).exists() else sorted(glob.glob(pattern))
    if not folders:
        raise UserError(f"no workdir matches {flags.workdir!r}: expected --workdir 'runs/*', for example")
    reports.write([paths.path(folder) for folder in folders])


def of_recipe(flags: argparse.Namespace, chosen: Recipe, overrides: list[str]) -> None:
    """Carries a recipe out: its unfinished runs, one after the other, then its report. Fields of the command line are
    for the runs that --only picks."""
    first = next(iter(chosen.runs.values()))
    root = paths.path(flags.workdir or f"runs/{first.name.removesuffix('/' + first.run)}")
    names = {run.name for run in recipe.only(recipe.plan(chosen, root), flags.only)}
    for name, config in chosen.runs.items():
        configs.checked(config, overrides if name in names else [], f"run {name}: ")
    if flags.list_fields:
        return list_fields(first)
    taken = [run for run in recipe.plan(chosen, root) if run.name in names]
    if flags.list:
        return tables.show([recipes.states(taken)])
    if not (root / recipe.FILE).exists():
        runs.refuse_foreign(root, chosen.runs)
    for run in taken:
        runs.check_workdir(run.config, run.workdir, exists=False)
    with _cluster(flags, root, {f"{name}: ": config for name, config in chosen.runs.items()}):
        if jax.process_index() == 0:
            recipe.write(chosen, root)
        if flags.mode == "train":
            reliable, failed = recipes.carry_out(taken, flags.wait)
        else:
            finished = [run for run in taken if status.read(run.workdir).is_trained]
            which = [(flags.checkpoint,)] if flags.checkpoint else []
            reliable, failed = all([runs.evaluate(run.config, run.workdir, *which) for run in finished]), []
        if jax.process_index() == 0:
            reports.write([root])
    if failed:
        raise UserError(f"{len(failed)} of {len(taken)} runs failed ({', '.join(failed)}); each is tried again by the "
                        "same command")
    _end(flags, reliable)


def list_fields(config: ConfigDict) -> None:
    """Prints every field of a config: its value, what it takes, and one line on it."""
    rows = [(f"--config.{name}", str(value), expected, what)
            for name, value, expected, what in configs.describe(config)]
    tables.show([tables.Table("Fields", ("field", "value", "takes", "what it is"), rows)])


def _check(flags: argparse.Namespace) -> None:
    if flags.checkpoint and flags.mode == "train":
        raise UserError("--checkpoint is for --mode evaluate and export: expected no such flag with --mode train")
    if flags.coordinator and flags.mode == "export":
        raise UserError("--coordinator is for --mode train and evaluate: expected no such flag with --mode export, "
                        "which is done by one process")
    if flags.checkpoint and not flags.checkpoint.isdigit():
        one_of("checkpoint", flags.checkpoint, checkpoint.NAMES)


def _load(flags: argparse.Namespace) -> ConfigDict | Recipe:
    """What the flags name: a config file, or for evaluate and export the config of a workdir."""
    if flags.config:
        return recipe.load(flags.config)
    if flags.mode != "train" and flags.workdir:
        stored = paths.path(flags.workdir) / "config.json"
        if not stored.exists():
            raise UserError(f"no run in {flags.workdir}: it has no config.json")
        return configs.read(stored)
    if flags.list_fields:
        return configs.default()
    raise UserError("--config is missing: expected for example --config configs/digits_r18.py, or --mode evaluate "
                    "or export with the --workdir of a run")


def _cluster(flags: argparse.Namespace, workdir: epath.Path, planned: Mapping[str, ConfigDict]):
    facts = _facts(flags, workdir, planned) if flags.coordinator else {}
    return meshes.cluster(flags.coordinator, flags.num_processes, flags.process_id, facts, flags.join_timeout)


def _facts(flags: argparse.Namespace, workdir: epath.Path, planned: Mapping[str, ConfigDict]) -> dict[str, str]:
    """What must be the same in every process of a cluster; the fields of a recipe's runs have their names in front."""
    code = b"".join(path.read_bytes() for path in sorted(Path(advmoe_jax.__file__).parent.rglob("*.py")))
    facts = {"advmoe_jax": f"{advmoe_jax.__version__} ({hashlib.sha256(code).hexdigest()[:8]})", "jax": jax.__version__,
             "--workdir": str(workdir.resolve())}
    facts |= {f"--{name}": getattr(flags, name) for name in ("mode", "checkpoint", "only")}
    facts["--wait"] = str(flags.wait)
    for where, config in planned.items():
        facts |= {f"{where}{name}": str(value) for name, value in configs.flatten(config).items()
                  if name not in configs.OF_A_HOST}
    return facts


def _end(flags: argparse.Namespace, reliable: bool) -> None:
    if flags.strict and not reliable:
        raise UnreliableError("the evaluation is unreliable: its report says why")
