"""The commands that make a run's numbers again."""

import shlex

from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import recipe
from advmoe_jax.core.errors import UserError
from advmoe_jax.report.runs import CHECKPOINTS, Run
from advmoe_jax.train import checkpoint, weights

_MAIN, _IMPORT = "python -m advmoe_jax.main", "python -m advmoe_jax.interop.torch_import"
_COMPACT = "python -m advmoe_jax.interop.compact"


def train(run: Run) -> str:
    """The command that trains it: the config file that it came from, and every field that differs. Of what was
    imported, made compact or exported, the command that did so."""
    config, workdir = run.config, run.folder
    if weights.is_in(workdir):
        return _exported(workdir, weights.origin(workdir))
    for meta in checkpoint.metas(workdir).values():
        if "imported" in meta:
            return _imported(config, workdir, meta["imported"])
        if "compacted" in meta:
            made = meta["compacted"]
            return (f"{_COMPACT} --workdir {shlex.quote(made['workdir'])} --out {shlex.quote(str(workdir))} "
                    f"--checkpoint {made['checkpoint']}")
    words = [_MAIN, "--config", ":".join(filter(None, (config.file, config.argument)))]
    base = _base(config)
    if config.run:
        words += ["--only", config.run]
        workdir = workdir.parent
    words += ["--workdir", shlex.quote(str(workdir))]
    if base is not None:
        ours, theirs = configs.flatten(config), configs.flatten(base)
        words += [f"--config.{name}={shlex.quote(str(value))}" for name, value in ours.items()
                  if name not in ("init_from", "name", "file") and theirs.get(name) != value]
    return " ".join(words)


def _imported(config: ConfigDict, workdir, source: dict[str, str]) -> str:
    flags = {"arch": source["arch"], "weights": source["file"], "out": str(workdir), "mean": config.model.mean,
             "std": config.model.std, "data": config.data.name}
    if "shortcut_pad" in config.model:
        flags["shortcut-pad"] = config.model.shortcut_pad
    return " ".join((_IMPORT, *(f"--{name} {shlex.quote(value)}" for name, value in flags.items())))


def _exported(workdir, origin: weights.Origin) -> str:
    fields = origin.export | {"out": str(workdir)}
    return " ".join((f"{_MAIN} --mode export --workdir {shlex.quote(origin.workdir)} --checkpoint {origin.checkpoint}",
                     *(f"--config.export.{name}={shlex.quote(value)}" for name, value in fields.items())))


def _base(config: ConfigDict) -> ConfigDict | None:
    """What the config file gives today, if it is there."""
    try:
        loaded = recipe.load(":".join(filter(None, (config.file, config.argument))))
        return loaded.runs[config.run] if config.run else loaded
    except (UserError, KeyError, AttributeError):
        return None


def evaluate(run: Run) -> list[str]:
    """The commands that measure it, one for each suite, set of images, seed and checkpoints."""
    commands: dict[tuple, dict[str, None]] = {}
    for entry in run.entries:
        step = None if entry["checkpoint"] in CHECKPOINTS else entry["checkpoint"]
        *fields, (last, text) = ({"n": entry["n"], "seed": entry["seed"]} | entry["asked"]).items()
        commands.setdefault((step, last, *fields), {})[text] = None
    return [_evaluate(run, step, dict(fields) | {last: (", " if last == "eps" else " ").join(texts)})
            for (step, last, *fields), texts in commands.items()]


def _evaluate(run, step, fields):
    words = [f"{_MAIN} --mode evaluate --workdir {shlex.quote(str(run.folder))}"]
    words += [f"--checkpoint {step}"] if step else []
    return " ".join(words + [f"--config.eval.{name}={shlex.quote(str(value))}" for name, value in fields.items()
                             if value != run.config.eval[name]])
