"""Tables of a paper with our numbers beside the paper's, which are always shown as the paper's."""

from collections.abc import Mapping, Sequence

import numpy as np

from advmoe_jax.core import tables
from advmoe_jax.core.recipe import Line, Printed
from advmoe_jax.core.tables import Table
from advmoe_jax.report import criteria, runs
from advmoe_jax.report.criteria import Group
from advmoe_jax.report.runs import Run

MACS, ROUTER, TOTAL, PARAMS = "MACs, M", "router MACs, M", "total MACs, M", "params, M"
SA, RA = "SA", "RA by "
_COSTS = {MACS: "pathway", ROUTER: "router", TOTAL: "total", PARAMS: "params"}
_READ = ("Ours, in parentheses what the paper prints. Rows marked as the paper's have no like here and were not run; a "
         "- is a number that is not measured yet, or that the paper does not give.")
_COUNTED = ("Our MACs are multiply-accumulates of convolutions and linear layers. The paper's counter also counts "
            "norms, biases and pools, as pruning.paper_macs does.")


def table(of: Printed, found: Mapping[str, Run]) -> tuple[Table, dict[str, dict[str, float]]]:
    """One table of a paper.

    Args:
        of: what the paper prints.
        found: {name: run} of the recipe.
    Returns:
        The table; and {label: {criterion: superscore}} of the lines that were measured, for bars.
    """
    groups = {(line.label, line.best): group for line in of.lines if (group := _group(line, found))}
    if of.is_of_ranks:
        return _ranks(of, groups, found), {}
    rows = [(line.label if line.runs or line.ours else f"{line.label} (paper's)", line.best,
             *(_cell(line, column, groups.get((line.label, line.best)), found) for column in of.columns))
            for line in of.lines]
    names = ("method", "best by", *of.columns)
    if not any(line.best for line in of.lines):
        rows, names = [(row[0], *row[2:]) for row in rows], (names[0], *names[2:])
    measured = [found[name] for line in of.lines for name in line.runs if (line.label, line.best) in groups]
    notes = (_READ, *([_COUNTED] if any(MACS in line.printed for line in of.lines) else ()),
             *([criteria.how(measured[0])] if measured else ()), *of.notes, *_tracks(of, found))
    scores = {label: {name: rate for name, rate in group.means().items() if name in of.columns}
              for (label, _), group in groups.items()}
    alike = next((scored.keys() for scored in scores.values() if scored), ())
    return Table(of.title, names, rows, notes), {
        label: scored for label, scored in scores.items() if scored and scored.keys() == alike}


def _group(line: Line, found: Mapping[str, Run]) -> Group | None:
    """The evaluations of the runs of a line that have any."""
    measured = [tuple(criteria.evaluations(found[name])) for name in line.runs if name in found]
    return Group(line.label, tuple(filter(None, measured))) if any(measured) else None


def _tracks(of: Printed, found: Mapping[str, Run]) -> tuple[str, ...]:
    return runs.tracks((runs.named(line.label, found[name]), found[name])
                       for line in of.lines for name in line.runs if name in found)


def _cell(line: Line, column: str, group: Group | None, found: Mapping[str, Run]) -> str:
    ours = line.ours.get(column) or _measured(line, column, group, found)
    theirs = line.printed.get(column)
    theirs = "" if theirs is None else f"({_number(theirs, column)})"
    return " ".join(filter(None, (ours or (tables.NOTHING if line.runs or not theirs else ""), theirs)))


def _number(value: float | str, column: str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if column in _COSTS else tables.decimals(value)


def _measured(line: Line, column: str, group: Group | None, found: Mapping[str, Run]) -> str:
    if column in _COSTS:
        entry = next((run.entries[0] for name in line.runs if (run := found.get(name)) and run.entries), None)
        return f"{entry['macs'][_COSTS[column]] / 1e6:.3f}" if entry else ""
    if column == SA or column.startswith(RA):
        measured = [_of_best(found[name], column) for name in line.runs if name in found]
        rates = [rate for rate in measured if rate is not None]
        return tables.mean_and_deviation(rates, len(line.runs)) if rates else ""
    if group is None or line.best not in ("last", *group.found[0][-1].rates):
        return ""
    rates = group.cells(line.best).get(column)
    return tables.mean_and_deviation(rates, len(line.runs)) if rates else ""


def _of_best(run: Run, column: str) -> float | None:
    """A rate of the best checkpoint: of the largest set of images, as measured last."""
    attack, kind = column.removeprefix(RA), "sa" if column == SA else "ra"
    found = [entry for entry in run.entries if entry["checkpoint"] == "best" and entry["attack"] == (
        attack if kind == "ra" else entry["attack"])]
    return max(found, key=lambda entry: entry["n"])[kind] if found else None


def _ranks(of: Printed, groups: Mapping[tuple[str, str], Group], found: Mapping[str, Run]) -> Table:
    """A row for each label: its mean rank in each column among the lines that were measured there, and in all."""
    ours: dict[str, dict[str, float]] = {}
    for column in of.columns:
        measured = {label: list(group.means().values()) for (label, best), group in groups.items() if best == column}
        if len(measured) > 1:
            for label, rank in zip(measured, criteria.mean_ranks(list(measured.values()))):
                ours.setdefault(label, {})[column] = float(rank)
    ranked = [column for column in of.columns if column != "all"]
    for of_label in ours.values():
        if all(column in of_label for column in ranked):
            of_label["all"] = float(np.mean([of_label[column] for column in ranked]))
    rows = [(label if any(line.runs for line in lines) else f"{label} (paper's)", *(
        _rank_cell(ours.get(label, {}).get(column), lines, column) for column in of.columns))
        for label, lines in _by_label(of.lines).items()]
    few = f"Our ranks are among the {len(ours)} methods that were measured, the paper's among {len(rows)}."
    return Table(of.title, ("method", *of.columns), rows, (_READ, criteria.RANKED, few, *of.notes, *_tracks(of, found)))


def _by_label(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.label, []).append(line)
    return found


def _rank_cell(ours: float | None, lines: Sequence[Line], column: str) -> str:
    theirs = next((line.printed[column] for line in lines if column in line.printed), None)
    has_runs = any(line.runs for line in lines)
    return " ".join(filter(None, (f"{ours:.4g}" if ours else tables.NOTHING if has_runs else "",
                                  f"({theirs:.4g})" if theirs is not None else "")))
