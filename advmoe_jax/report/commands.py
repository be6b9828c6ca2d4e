"""The commands that make a run's numbers again."""

import re
import shlex
from pathlib import Path

from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.report.runs import CHECKPOINTS, Run

_MAIN = "python -m advmoe_jax.main"


def without_seed(name: str) -> str:
    """A config's name without the seed at its end: "digits_r18_s3", "digits_r18_seed3" -> "digits_r18"."""
    return re.sub(r"[_-](seed|s)[_-]?\d+$", "", name)


def train(run: Run) -> str:
    """The command that trains it: the config file and argument that its name says, and every field that differs."""
    name = run.config.name
    for candidate in dict.fromkeys((name, without_seed(name))):
        found = _config_file(candidate)
        if found:
            text, base = found
            break
    else:
        text, base = f"configs/{name}.py", None
    words = [_MAIN, "--config", text, "--workdir", shlex.quote(str(run.folder))]
    if base is not None:
        ours, theirs = configs.flatten(run.config), configs.flatten(base)
        words += [f"--config.{k}={shlex.quote(str(v))}" for k, v in ours.items() if theirs.get(k) != v]
    return " ".join(words)


def _config_file(name: str) -> tuple[str, ConfigDict] | None:
    """"FILE[:ARGUMENT]" of the file below configs/ that gives a config of this name, and that config."""
    words = name.split("_")
    for i in range(len(words), 0, -1):
        argument = "_".join(words[i:])
        for path in sorted(Path("configs").rglob(f"{'_'.join(words[:i])}.py")):
            text = f"{path.as_posix()}:{argument}" if argument else path.as_posix()
            try:
                return text, configs.load(text)
            except UserError:
                continue
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
