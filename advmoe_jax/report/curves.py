"""Figures over several finished runs: RA against eps, against model scale, against cost, and while they were trained.

    python -m advmoe_jax.report.curves --workdir RUN RUN --out FOLDER
    python -m advmoe_jax.report.curves --workdir RECIPE --out FOLDER

As figures 1, 2, 7, 8 and A2 of AdvMoE (Zhang et al., ICCV 2023). Reads what was measured and attacks nothing. Draws
what the runs have: eps.png, where evaluations of one attack have several eps; scale.png, where runs differ in the model
scale; overview.png, RA and SA over multiply-accumulates; trajectory.png. Beside them curves.json, and table.md.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from advmoe_jax.core import cli, paths, shares, tables
from advmoe_jax.core import config as configs
from advmoe_jax.core.tables import Table
from advmoe_jax.report import curve_plots, findings, runs, selection
from advmoe_jax.report.runs import Run
from advmoe_jax.report.selection import Measured

_SCALE = re.compile(r"[,:]?\s*\br\s*=\s*[\d./]+")  # in a label, which is then of a line
_MEANS = "Percent, best checkpoint, mean ± sample standard deviation over training seeds."


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
    chosen = selection.of(folders, attack)
    of_attack, at, paper = chosen.measured, chosen.at, chosen.paper
    lines, theirs = _scales(at, paper)
    return {
        "attack": "{attack}, {norm}, {n} test images of {data}".format(**of_attack[0][2]), "at": at[0][2]["eps"],
        "eps": {label: of for label, of in _lines(
            (label, entry["eps_value"], entry["ra"]) for label, _, entry in of_attack).items() if len(of) > 1},
        "scale": lines, "overview": _overview(at),
        "trajectory": _trajectories(of_attack),
        "paper": {"scale": theirs, "overview": paper}}


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


def _trajectories(of_attack: Measured) -> dict[str, list[dict[str, Any]]]:
    """SA and RA of each run on the images that choose its best checkpoint."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for label, run in {run.folder: (label, run) for label, run, _ in of_attack}.values():
        if measured := [record for record in run.metrics if record["split"] != "train"]:
            shown.setdefault(label, []).append({
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
    findings.write(out, "curves", found, shown)
    findings.show(out, ("curves.json", "table.md", *curve_plots.write(out, found)), shown)


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
