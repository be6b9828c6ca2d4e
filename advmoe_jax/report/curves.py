"""Figures over several finished runs: RA against eps, against model scale, against cost, and while they were trained.

    python -m advmoe_jax.report.curves --workdir RUN RUN --out FOLDER
    python -m advmoe_jax.report.curves --workdir RECIPE --out FOLDER

As figures 1, 2, 7, 8 and A2 of AdvMoE (Zhang et al., ICCV 2023). Reads what was measured and attacks nothing. Draws
what the runs have: eps.png, where evaluations of one attack have several eps; scale.png, where runs differ in the model
scale; overview.png, RA and SA over multiply-accumulates; trajectory.png. Beside them curves.json, and table.md.
"""

import collections
import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from advmoe_jax.core import cli, files, paths, recipe, shares, tables
from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError, unknown_name
from advmoe_jax.core.tables import Table
from advmoe_jax.report import comparison, curve_plots, printed, runs
from advmoe_jax.report.runs import Run

_SCALE = re.compile(r"[,:]?\s*\br\s*=\s*[\d./]+")  # in a label, which is then of a line
_MEANS = "Percent, best checkpoint, mean ± sample standard deviation over training seeds."

Measured = list[tuple[str, Run, dict[str, Any]]]
"""Labels, runs and their evaluations."""


def measure(folders: Sequence[epath.Path], attack: str = "") -> dict[str, Any]:
    """What curves.json holds.

    Args:
        folders: of runs, or of recipes, whose rows then are the labels, and whose other runs are left out. Runs by
            themselves are labelled by their method and the fields in which runs of one method differ beside the seed.
        attack: by its name, "pgd-50"; "": the one by which most runs were measured, of several the one on most images.
    Returns:
        {"attack": as tables name it without eps; "at": the eps, as text, that most runs were trained for and measured
        at, which all but the first figure show; "eps": {label: {eps: [RA of each run]}} of labels that were measured at
        several; "scale": {line: {model scale: [RA]}}, if there are several scales; "overview": {label: {"line", "macs",
        "ra": [RA], "sa": [SA]}}; "trajectory": {label: [{"epochs", "sa", "ra", "on": which images} of each run]};
        "paper": {"scale", "overview": the paper's RA in the same places}}. Rates are fractions.
    Raises:
        UserError: a folder holds neither, a file is damaged, or nothing was measured by that attack.
    """
    found, labels, recipes = _runs(folders)
    every = [("", run, entry) for run in found for entry in run.entries
             if entry["checkpoint"] == "best" and entry["norm"]]
    known = dict.fromkeys(entry["attack"] for _, _, entry in every)
    if attack and attack not in known:
        raise unknown_name("attack in --attack", attack, known)
    if not every:
        raise UserError(f"nothing was measured in {', '.join(map(str, folders))}: expected runs whose best checkpoint "
                        "was evaluated by an attack with a budget")
    measured = _most(every, lambda entry: _key(entry) if attack in ("", entry["attack"]) else None)
    names = _labels([run for run in found if any(run is of for _, of, _ in measured)], labels)
    of_attack = [(names[run.folder], run, entry) for _, run, entry in measured]
    trained = [of for of in of_attack if of[2]["eps"] == of[1].config.attack.eps]
    at = _most(trained or of_attack, lambda entry: entry["eps_value"])
    paper = _paper(at, labels, recipes)
    lines, theirs = _scales(at, paper)
    return {
        "attack": "{attack}, {norm}, {n} test images of {data}".format(**of_attack[0][2]), "at": at[0][2]["eps"],
        "eps": {label: of for label, of in _lines(
            (label, entry["eps_value"], entry["ra"]) for label, _, entry in of_attack).items() if len(of) > 1},
        "scale": lines, "overview": _overview(at),
        "trajectory": _trajectories([run for run in found if run.folder in names], names),
        "paper": {"scale": theirs, "overview": paper}}


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


def _paper(at: Measured, labels: Mapping[str, str], recipes: Mapping[epath.Path, Mapping[str, Any]]
           ) -> dict[str, float]:
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


def _lines(points: Iterable[tuple[str, float, float]]) -> dict[str, dict[float, list[float]]]:
    """{line: {x: [y]}}, x rising."""
    found: dict[str, dict[float, list[float]]] = {}
    for line, x, y in points:
        found.setdefault(line, {}).setdefault(x, []).append(y)
    return {line: dict(sorted(of.items())) for line, of in found.items()}


def line_of(label: str) -> str:
    """"AdvMoE, N=2" of "AdvMoE, N=2, r=0.5"."""
    return _SCALE.sub("", label).replace("()", "").strip(" ,:") or label


def _scales(at: Measured, paper: Mapping[str, float]
            ) -> tuple[dict[str, dict[float, list[float]]], dict[str, dict[float, float]]]:
    """RA by model scale, a line for each label without its scale, and the paper's RA; ({}, {}) for a single scale."""
    placed = [(label, line_of(label), scale, run, entry) for label, run, entry in at
              if (scale := model_scale(run)) is not None]
    if len({scale for *_, scale, _, _ in placed}) < 2:
        return {}, {}
    ours = _lines((of, scale, entry["ra"]) for _, of, scale, _, entry in placed)
    theirs: dict[str, dict[float, float]] = {}
    for label, of, scale, *_ in placed:
        if label in paper:
            theirs.setdefault(of, {})[scale] = paper[label]
    return ours, theirs


def model_scale(run: Run) -> float | None:
    """r, the share of the dense network's channels that an image uses: of a network whose filters were searched what
    stays. None where anything else is pruned, or the search that a run started from is not there."""
    config = run.config
    if config.system.name == "prune" and config.system.method == "given":
        source = next(iter(paths.listed(config.init_from)), "")
        folder = paths.path(paths.source(source)[0])
        folder = next((of for of in (folder, run.folder.parent / folder.name) if runs.is_run(of)), None)
        config = configs.read(folder / "config.json") if folder else config
    if config.system.name == "mask_search" and config.system.unit == "filter":
        return round(config.model.model_scale * float(1 - shares.share(config.system.rate)), 6)
    is_whole = config.system.name not in ("mask_search", "prune", "admm")
    return config.model.get("model_scale") if is_whole else None


def _overview(at: Measured) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for label, _, entry in at:
        of = found.setdefault(label, {"line": line_of(label), "macs": entry["macs"]["total"], "ra": [], "sa": []})
        of["ra"].append(entry["ra"])
        of["sa"].append(entry["sa"])
    return found


def _trajectories(found: Sequence[Run], names: Mapping[epath.Path, str]) -> dict[str, list[dict[str, Any]]]:
    """SA and RA of each run on the images that choose its best checkpoint."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        if measured := [record for record in run.metrics if record["split"] != "train"]:
            shown.setdefault(names[run.folder], []).append({
                "epochs": [record["step"] * run.epochs_per_step for record in measured], "on": measured[0]["split"],
                **{kind: [record[kind] for record in measured] for kind in ("sa", "ra")}})
    return shown


def summary(found: Mapping[str, Any]) -> list[Table]:
    """Tables of what `measure` gave."""
    shown = []
    if found["eps"]:
        shown.append(_grid(f"RA against eps, {found['attack']}", "method", found["eps"], lambda eps: f"eps {eps:.4g}"))
    where = f"{found['attack']}, eps {found['at']}"
    if found["scale"]:
        shown.append(_grid(f"RA against model scale, {where}", "line", found["scale"], lambda r: f"r = {r:.4g}"))
    rows = [(label, *(tables.mean_and_deviation(of[kind], len(of[kind])) for kind in ("sa", "ra")),
             tables.millions(of["macs"]), *([tables.percent(theirs[label]) if label in theirs else tables.NOTHING]
                                            if theirs else []))
            for theirs in [found["paper"]["overview"]] for label, of in found["overview"].items()]
    paper = ["RA %, paper"] if found["paper"]["overview"] else []
    return [*shown, Table(f"Overview, {where}", ("method", "SA %", "RA %", "MACs, M", *paper), rows, (_MEANS,))]


def _grid(title: str, first: str, lines: Mapping[str, Mapping[float, Sequence[float]]], named: Callable[[float], str]
          ) -> Table:
    places = sorted({x for of in lines.values() for x in of})
    rows = [(line, *(tables.mean_and_deviation(of.get(x, ()), len(of.get(x, ()))) for x in places))
            for line, of in lines.items()]
    return Table(title, (first, *map(named, places)), rows, (_MEANS,))


def write(out: epath.Path, found: Mapping[str, Any]) -> None:
    """Writes curves.json and table.md, and with matplotlib the figures, and prints the tables.

    Args:
        out: the folder, which is made.
        found: what `measure` gave.
    """
    shown = summary(found)
    files.write_json(out / "curves.json", found)
    files.write_text(out / "table.md", "\n".join(map(tables.markdown, shown)))
    drawn = curve_plots.write(out, found)
    tables.show(shown)
    print(f"report: {', '.join([str(out / 'curves.json'), 'table.md', *drawn])}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    parser = cli.Parser(prog="python -m advmoe_jax.report.curves", description=(
        "Draws what finished runs have: RA against eps, model scale and cost, and accuracies while they were trained."))
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR", help="of runs, or of a recipe")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where curves.json, table.md and the plots go")
    parser.add_argument("--attack", default="", metavar="NAME", help="whose evaluations count, such as pgd-50; unless "
                                                                     "given the one by which most runs were measured")

    def run():
        args = parser.parse_args(argv)
        folders = [paths.path(name) for text in args.workdir for name in paths.listed(text)]
        write(paths.path(args.out), measure(folders, args.attack))

    return cli.ending(run)


if __name__ == "__main__":
    cli.leave(main)
