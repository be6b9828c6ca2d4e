"""Which evaluations of finished runs figures show, what the runs are called there, and what a paper has of them."""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from etils import epath

from advmoe_jax.core import recipe
from advmoe_jax.core.errors import UserError, unknown_name
from advmoe_jax.report import comparison, printed, runs
from advmoe_jax.report.runs import Run

Measured = list[tuple[str, Run, dict[str, Any]]]
"""Labels, runs and their evaluations."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Evaluations of best checkpoints by one attack on the same images.

    Attributes:
        measured: at every eps.
        at: those at the eps that most runs were trained for and measured at.
        paper: {label: RA, a fraction}, that a paper has of the runs by that attack.
    """

    measured: Measured
    at: Measured
    paper: dict[str, float]


def of(folders: Sequence[epath.Path], attack: str = "") -> Selection:
    """Chooses evaluations. Arguments and errors as `curves.measure`."""
    found, labels, recipes = _runs(folders)
    every = [("", run, entry) for run in found for entry in run.entries
             if entry["checkpoint"] == "best" and entry["norm"]]
    known = dict.fromkeys(entry["attack"] for _, _, entry in every)
    if attack and attack not in known:
        raise unknown_name("attack in --attack", attack, known)
    if not every:
        raise UserError(f"nothing was measured in {', '.join(map(str, folders))}: expected runs whose best checkpoint "
                        "was evaluated by an attack with a budget")
    chosen = _most(every, lambda entry: _key(entry) if attack in ("", entry["attack"]) else None)
    names = _labels(list({run.folder: run for _, run, _ in chosen}.values()), labels)
    measured = [(names[run.folder], run, entry) for _, run, entry in chosen]
    trained = [of for of in measured if of[2]["eps"] == of[1].config.attack.eps]
    at = _most(trained or measured, lambda entry: entry["eps_value"])
    return Selection(measured, at, _paper(at, recipes))


def _runs(folders: Sequence[epath.Path]) -> tuple[list[Run], dict[str, str], dict[epath.Path, dict[str, Any]]]:
    """Runs, the labels that recipes give them, and the recipes by their folders."""
    found, labels, recipes = [], {}, {}
    for folder in folders:
        stored = recipe.read(folder)
        if stored is None:
            found.append(runs.load(folder))
            continue
        recipes[folder] = stored
        labelled = {name: label for label, names in stored["rows"].items() for name in names}
        found += [runs.load(folder / name) for name in labelled or stored["runs"] if runs.is_run(folder / name)]
        labels |= {str(folder / name): label for name, label in labelled.items()}
    return found, labels, recipes


def _paper(at: Measured, recipes: Mapping[epath.Path, Mapping[str, Any]]) -> dict[str, float]:
    """{label: RA, a fraction}, that a paper has of runs by the attack: beside a row of a recipe, or in its tables."""
    column, told = f"{printed.RA}{at[0][2]['attack']}", {}
    for folder, stored in recipes.items():
        told |= {str(folder / name): numbers["RA"] for label, numbers in stored["paper"].items() if "RA" in numbers
                 for name in stored["rows"].get(label, ())}
        told |= {str(folder / name): line.printed[column] for table in stored["tables"] for line in table.lines
                 if column in line.printed for name in line.runs}
    numbers = {label: re.match(r"\s*[\d.]+", str(told[str(run.folder)])) for label, run, _ in at
               if str(run.folder) in told}
    return {label: float(of[0]) / 100 for label, of in numbers.items() if of}


def _labels(found: Sequence[Run], labels: Mapping[str, str]) -> dict[epath.Path, str]:
    """Of each run: what a recipe says, or its method and the fields that tell it from others of that method; without a
    heading, "Figure 8: ", that all of them share."""
    methods = {run.folder: run.entries[0]["method"] if run.entries else run.config.name for run in found}
    alike = collections.defaultdict(list)
    for run in found:
        alike[methods[run.folder]].append(comparison.identity(run))
    names = {run.folder: labels.get(str(run.folder)) or ", ".join((
        methods[run.folder], *comparison.differing(comparison.identity(run), alike[methods[run.folder]])))
        for run in found}
    heading = os.path.commonprefix(list(names.values())).rpartition(": ")
    return {folder: name.removeprefix("".join(heading[:2])) for folder, name in names.items()}


def _key(entry: Mapping[str, Any]) -> tuple:
    settings = {name: value for name, value in entry["settings"].items() if name not in ("eps", "driver")}
    return entry["n"], entry["data"], entry["norm"], entry["attack"], json.dumps(settings), entry["seed"]


def _most(measured: Measured, key: Callable[[dict[str, Any]], Hashable | None]) -> Measured:
    """Those that share the key that most runs have, of several the largest; None is no key."""
    having = collections.defaultdict(set)
    for _, run, entry in measured:
        if (of := key(entry)) is not None:
            having[of].add(run.folder)
    chosen = max(having, key=lambda of: (len(having[of]), of))
    return [of for of in measured if key(of[2]) == chosen]
