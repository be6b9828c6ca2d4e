"""Accuracies under each attack of a suite, attacks down and runs across: who stands what, and the worst case of all.

m images.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from advmoe_jax.core import files, tables
from advmoe_jax.core.tables import Table
from advmoe_jax.report import runs
from advmoe_jax.report.runs import Run

_CLEAN, _ALL = "clean", "all"
_NOTE = ("Percent, best checkpoint. Each attack got all images that are correct when clean, and what does not depend "
         "on the model (fog, snow, rotation) all images: there it is the accuracy on what it makes. Of a model with "
         "several gradients an accuracy is the worst case over them. The last row is the worst case of an image over "
         "every attack of its column, and clean: attacks that know of a part of a model are in the columns of such "
         "models alone.")
_ORACLE = ("{labels}: for each attack whichever of its runs stands it best on these images, a ceiling that no model "
           "reaches without knowing the attack.")

_Row = tuple[str, str, str]  # attack, norm and eps


@dataclasses.dataclass(frozen=True)
class Matrix:
    """What was measured by a suite.

    Attributes:
        table: as reports show it.
        rows, columns: attacks, with unions last; labels of runs.
        rates: (rows, columns) in percent, means over seeds; NaN where nothing was measured.
    """

    table: Table
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    rates: np.ndarray


def of(found: Sequence[Run], labels: Mapping[str, str] = MappingProxyType({}),
       oracles: Mapping[str, Sequence[str]] = MappingProxyType({}),
       paper: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> list[Matrix]:
    """A matrix for each suite and set of images by which two runs or more were measured.

    Args:
        found: runs.
        labels: {workdir: label of its column}; runs without one are left out if any has one.
        oracles: {label: names of runs}, as of `core.recipe.Recipe`.
        paper: {label: {line: percent}}, as of the same; shown behind ours.
    """
    suites: dict[tuple, dict[str, list[tuple[Run, dict[str, Any]]]]] = {}
    for run in found:
        label = labels.get(str(run.folder), "" if labels else run.folder.name)
        for entry in run.entries:
            if entry["checkpoint"] == "best" and len(entry.get("by_attack", ())) > 1:
                key = entry["attack"], entry["data"], entry["n"], entry["seed"]
                suites.setdefault(key, {}).setdefault(label, []).append((run, entry))
    return [_matrix(key, columns, oracles, paper) for key, columns in suites.items() if len(columns.keys() - {""}) > 1]


def _matrix(key, columns, oracles, paper) -> Matrix:
    measured = [pair for pairs in columns.values() for pair in pairs]
    shown = {label: [_rates(entry) for _, entry in pairs] for label, pairs in columns.items() if label}
    made = {label: _of_oracle(names, measured) for label, names in oracles.items()}
    shown |= {label: rates for label, rates in made.items() if rates}
    order = dict.fromkeys(row for of_column in shown.values() for rates in of_column for row in rates)
    unions = [row for row in order if row[0] == _ALL or row[0].startswith(f"{_ALL} ")]
    order = [row for row in order if row not in unions] + unions
    cells = {label: [[rates[row] for rates in of_column if row in rates] for row in order]
             for label, of_column in shown.items()}
    titles = tuple(_title(row, order) for row in order)

    def cell(label, i):
        ours = tables.mean_and_deviation(cells[label][i], len(shown[label])) if cells[label][i] else tables.NOTHING
        theirs = paper.get(label, {}).get(titles[i])
        return ours if theirs is None else f"{ours} (paper {tables.decimals(theirs)})"

    lines = [(title, *(cell(label, i) for label in shown)) for i, title in enumerate(titles)]
    rates = np.array([[100 * np.mean(cells[label][i]) if cells[label][i] else np.nan for label in shown]
                      for i in range(len(order))])
    names = {label: runs.named(label, pairs[0][0]) for label, pairs in columns.items()}
    notes = [_NOTE, *runs.warnings([entry for _, entry in measured]),
             *runs.tracks((names[label], pairs[0][0]) for label, pairs in columns.items())]
    if told := [label for label, rates_of in made.items() if rates_of]:
        notes.append(_ORACLE.format(labels=", ".join(told)))
    title = f"{key[0]}, {key[2]} test images of {key[1]}"
    columns = ("attack", *(names.get(label, label) for label in shown))
    return Matrix(Table(title, columns, lines, tuple(notes)), titles, tuple(shown), rates)


def _rates(entry: dict[str, Any]) -> dict[_Row, float]:
    attacks = {_row(of): of.get("accuracy", of["ra"]) for of in entry["by_attack"]}
    return {(_CLEAN, "", ""): entry["sa"]} | attacks | {
        (name, "", ""): rate for name, rate in entry["unions"].items()} | {(_ALL, "", ""): entry["ra"]}


def _row(of: Mapping[str, Any]) -> _Row:
    return of["attack"], of["norm"], of["eps"] if of["norm"] else ""


def _title(row: _Row, order: Sequence[_Row]) -> str:
    name, norm, eps = row
    alike = sum(other[:2] == row[:2] for other in order) > 1
    return " ".join(filter(None, (name, norm, eps if alike else "")))


def _of_oracle(names: Sequence[str], measured: Sequence[tuple[Run, dict[str, Any]]]) -> list[dict[_Row, float]]:
    """Rates of each seed; none where not all of its runs were measured."""
    by_seed: dict[int, list[tuple[Run, dict[str, Any]]]] = {}
    for run, entry in measured:
        if run.folder.name in names:
            by_seed.setdefault(entry["train_seed"], []).append((run, entry))
    size = max(map(len, by_seed.values()), default=0)
    return [_best(pairs) for pairs in by_seed.values() if len(pairs) == size and size * len(by_seed) == len(set(names))]


def _best(pairs: Sequence[tuple[Run, dict[str, Any]]]) -> dict[_Row, float]:
    """Of each attack the best run's rate, and unions image by image of the runs that were chosen."""
    stands = [_stands(run, entry) for run, entry in pairs]
    common = [row for row in stands[0] if all(row in of_run for of_run in stands)]
    chosen = {row: max((of_run[row] for of_run in stands), key=np.mean) for row in common}
    rates = {row: float(of_row.mean()) for row, of_row in chosen.items()}
    by_pgd = [of_row for row, of_row in chosen.items() if row[0].startswith("pgd-")]
    unions = {"all PGD": by_pgd} if 1 < len(by_pgd) else {}
    return rates | {(name, "", ""): float(np.all(of_rows, 0).mean())
                    for name, of_rows in (unions | {_ALL: list(chosen.values())}).items()}


def _stands(run: Run, entry: dict[str, Any]) -> dict[_Row, np.ndarray]:
    """{row: (m,) bool}, who is right when clean, and under each attack by every gradient; under those that get all
    images, whoever is right then."""
    kept = files.read_npz(run.folder / "eval" / entry["id"] / "examples.npz")
    label, clean, attacked = kept["label"], kept["clean_prediction"], kept["adversarial_prediction"]
    found = {(_CLEAN, "", ""): clean == label}
    for attempt, predicted in zip(entry["attempts"], attacked):
        if "ra" in attempt:  # else it was a second look at some of the images
            settings = {"norm": "", "eps": ""} | attempt["settings"]
            row = _row({"attack": attempt["attack"]} | settings)
            before = np.ones_like(clean, bool) if "accuracy" in attempt else clean == label
            found[row] = found.get(row, before) & (predicted == label)
    return found
