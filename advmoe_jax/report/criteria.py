"""The best evaluation of each criterion, superscores and ranks, of runs that were measured by `train.criteria`.

A criterion is the accuracy on clean images ("benign") or under one attack. As SR-GKP's tables have it (NeurIPS 2023,
section 4.2), a row is the one evaluation that is best by a criterion, of equal ones the last, with all its accuracies.
A superscore is the best of each criterion by itself, which no single checkpoint need have; its figures show those.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.stats import rankdata

from advmoe_jax.core import tables
from advmoe_jax.core.tables import Table
from advmoe_jax.report import comparison, runs
from advmoe_jax.report.runs import Run

BENIGN, SUPERSCORE = "benign", "superscore"
_PREFIX = "accuracy/"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured of one state.

    Attributes:
        step: of training.
        epoch: the same in epochs.
        images: how many.
        ra: robust accuracy under the attack that chooses the best checkpoint.
        rates: {criterion: accuracy}, fractions, "benign" first.
    """

    step: int
    epoch: float
    images: int
    ra: float
    rates: dict[str, float]


def evaluations(run: Run) -> list[Evaluation]:
    """All of a run that have criteria, oldest first; none if it has no criteria."""
    found = []
    for record in run.metrics:
        attacked = {name.removeprefix(_PREFIX): rate for name, rate in record.items() if name.startswith(_PREFIX)}
        if record["split"] != "train" and attacked:
            epoch = record["step"] * run.epochs_per_step
            found.append(Evaluation(record["step"], epoch, record.get("images", 0), record["ra"],
                                    {BENIGN: record["sa"], **attacked}))
    return [evaluation for evaluation in found if evaluation.rates.keys() == found[-1].rates.keys()]


def best(found: Sequence[Evaluation], criterion: str) -> Evaluation:
    """The evaluation of the largest accuracy by a criterion; of equal ones the last."""
    return max(found, key=lambda evaluation: (evaluation.rates[criterion], evaluation.step))


def superscore(found: Sequence[Evaluation]) -> dict[str, float]:
    """{criterion: the largest accuracy of all evaluations}."""
    return {name: best(found, name).rates[name] for name in found[-1].rates}


def run_table(run: Run) -> Table | None:
    """The best evaluation by each criterion of one run, and the superscore; None if it has no criteria."""
    found = evaluations(run)
    if not found:
        return None
    rows = []
    for criterion in found[-1].rates:
        of = best(found, criterion)
        rows.append((criterion, str(of.step), f"{of.epoch:.4g}", *map(tables.percent, of.rates.values()),
                     tables.percent(of.ra)))
    rows.append((SUPERSCORE, "", "", *map(tables.percent, superscore(found).values()), ""))
    columns = ("best by", "step", "epoch", *(f"{name} %" for name in found[-1].rates), "RA %")
    return Table(f"Best evaluation by each criterion, {_images(run, found)}", columns, rows, (
        f"{len(found)} evaluations. {how(run)} RA is by {run.config.train.select_attack}, which alone chooses the best "
        "checkpoint.",))


def _images(run: Run, found: Sequence[Evaluation]) -> str:
    return f"{found[-1].images} {run.config.train.select_on} images of {run.config.data.name}"


def how(run: Run) -> str:
    """What a table of best evaluations says below itself."""
    where = {"test": "test images, which is optimistic", "validation": "images held out of training"}
    return ("Each row is one evaluation, the best by its criterion, of equal ones the last, chosen and measured on the "
            f"same {where[run.config.train.select_on]}. The superscore is the best of each column by itself. Attacks: "
            f"{run.config.train.criteria or 'those of the columns'}.")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that are a row: seeds of one method.

    Attributes:
        label: of the row.
        found: the evaluations of each run.
    """

    label: str
    found: tuple[tuple[Evaluation, ...], ...]

    def cells(self, criterion: str) -> dict[str, list[float]]:
        """{criterion: the accuracy of each run} of the evaluations that are best by a criterion, or of the last ones
        ("last"), or the superscore."""
        if criterion == SUPERSCORE:
            of_runs = [superscore(found) for found in self.found]
        else:
            of_runs = [(found[-1] if criterion == "last" else best(found, criterion)).rates for found in self.found]
        return {name: [rates[name] for rates in of_runs] for name in of_runs[0]}

    def means(self) -> dict[str, float]:
        """{criterion: mean superscore}."""
        return {name: float(np.mean(rates)) for name, rates in self.cells(SUPERSCORE).items()}


@dataclasses.dataclass(frozen=True)
class Compared:
    """Rows that were measured alike.

    Attributes:
        run: the first of their runs.
        groups: in the order of the runs.
    """

    run: Run
    groups: tuple[Group, ...]

    @property
    def criteria(self) -> tuple[str, ...]:
        return tuple(self.groups[0].found[0][-1].rates)

    @property
    def images(self) -> str:
        return _images(self.run, self.groups[0].found[0])


def compared(found: Sequence[Run], labels: Mapping[str, str] = MappingProxyType({})) -> list[Compared]:
    """What can stand beside each other: the same criteria, data, and kind and number of images.

    Args:
        found: runs; those without criteria are left out.
        labels: {workdir: label of its row}; without one, runs that differ only by the seed are a row.
    """
    alike: dict[tuple, dict[Any, list[tuple[Run, tuple[Evaluation, ...]]]]] = {}
    for run in found:
        if measured := tuple(evaluations(run)):
            config = run.config
            key = (config.data.name, config.data.subset, config.train.select_on, config.train.criteria,
                   measured[-1].images, tuple(measured[-1].rates))
            label = labels.get(str(run.folder), "")
            row = runs.named(label, run) if label else (tuple(comparison.identity(run).items()))
            alike.setdefault(key, {}).setdefault(row, []).append((run, measured))
    return [Compared(next(iter(rows.values()))[0][0], tuple(
        Group(row if isinstance(row, str) else runs.named(of[0][0].config.run or of[0][0].config.name, of[0][0]),
              tuple(measured for _, measured in of))
        for row, of in rows.items())) for rows in alike.values()]


def best_table(of: Compared) -> Table:
    """For each row and criterion the best evaluation, mean and deviation over its runs."""
    rows = []
    for group in of.groups:
        for criterion in of.criteria:
            cells = group.cells(criterion)
            rows.append((group.label, criterion, str(len(group.found)), *(
                tables.mean_and_deviation(rates, len(rates)) for rates in cells.values())))
    return Table(f"Best evaluation by each criterion, {of.images}",
                 ("method", "best by", "seeds", *(f"{name} %" for name in of.criteria)), rows, (how(of.run),))


def rank_table(of: Compared) -> Table | None:
    """Superscores and their mean ranks, the best first; None for a single row."""
    if len(of.groups) < 2:
        return None
    ranks = mean_ranks([list(group.means().values()) for group in of.groups])
    order = np.argsort(ranks, kind="stable")
    rows = [(of.groups[i].label, f"{ranks[i]:.4g}", *map(tables.percent, of.groups[i].means().values()))
            for i in order]
    columns = ("method", "mean rank", *(f"{name} %" for name in of.criteria))
    return Table(f"Superscores and mean ranks, {of.images}", columns, rows, (RANKED,))


RANKED = ("Mean rank: of the superscores, the mean over the criteria of a row's rank among the rows; equal ones share "
          "the mean of their ranks.")


def mean_ranks(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """(n,) of (n, criteria): 1 is the largest of all criteria; equal ones share the mean of their ranks."""
    return rankdata(-np.asarray(scores, float), axis=0).mean(1)
