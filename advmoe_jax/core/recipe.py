"""A recipe: a config file that names runs, some of which start from others.

The file defines `get_recipe(arg="") -> Recipe`. Each run has a workdir of its own below that of the recipe.
"""

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import files, paths
from advmoe_jax.core.errors import UserError, unknown_name

FILE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a paper's table.

    Attributes:
        label: what it is about, such as a method.
        best: which evaluation of the runs it shows: that which is best by this criterion, "benign" or the name of an
            attack of `train.criteria`; or "last". Of a table of ranks the column.
        printed: {column: number or text}, what the paper has; what is not there is shown as missing.
        ours: {column: text}, what is known without a run.
        runs: of the recipe, the seeds of what stands beside the paper's numbers; (): there is nothing, the line is the
            paper's alone.
    """

    label: str
    best: str = ""
    printed: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    ours: Mapping[str, str] = dataclasses.field(default_factory=dict)
    runs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Printed:
    """A table of a paper, of which a report has every line, with our numbers beside the paper's.

    Attributes:
        title: "Table 2: ResNet-56 on CIFAR-10".
        columns: criteria, "benign" and names of attacks of `train.criteria`; "SA" and "RA by ATTACK", by the name of an
            attack or suite, of the measurements of the best checkpoint; "MACs, M" of a pathway, "router MACs, M",
            "total MACs, M" and "params, M"; or any others, of which only the paper's and `Line.ours` are known. Of a
            table of ranks what rows are ranked in, and "all".
        lines: in order.
        notes: paragraphs below.
        is_of_ranks: whether the numbers are mean ranks of superscores among the lines of a column.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    is_of_ranks: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Runs of one experiment, and how their report shows them.

    Attributes:
        runs: {name: config} in order; `init_from` of one may name another.
        title: of the report.
        rows: {label: names of runs} of the report's tables, such as the seeds of a method; empty: runs that differ only
            by the seed are a row.
        paper: {label: {"SA": percent, "RA": percent}}, what a paper reports for a row; and of a matrix, by the names of
            its lines, such as "clean", "pgd-20 l2" and "all PGD".
        notes: paragraphs below the tables.
        tables: of a paper, to stand above.
        oracles: {label: names of runs} of columns of the matrix that take, for each attack, whichever of the runs of a
            seed stands it best.
    """

    runs: Mapping[str, ConfigDict]
    title: str = ""
    rows: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    paper: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tables: tuple[Printed, ...] = ()
    oracles: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of a recipe in its place.

    Attributes:
        name: in the recipe.
        config: its own, `init_from` naming workdirs.
        workdir: of the run.
        needs: names of the runs of the recipe that it starts from.
    """

    name: str
    config: ConfigDict
    workdir: epath.Path
    needs: tuple[str, ...]


def load(text: str) -> ConfigDict | Recipe:
    """Runs a config file, as `config.load`, and checks a recipe.

    Raises:
        UserError: as `config.load`; or the recipe has no runs, a run is no config, has a name that is no folder's, or
            needs a run that comes later or does not exist.
    """
    loaded = configs.load(text)
    if isinstance(loaded, ConfigDict):
        return loaded
    path, _, argument = text.partition(":")
    if not isinstance(loaded, Recipe) or not loaded.runs:
        raise UserError(f"get_recipe of {path} returns {type(loaded).__name__}: "
                        "expected a core.recipe.Recipe with runs")
    with configs.blamed(path):
        return _checked(loaded, path, argument)


def _checked(loaded: Recipe, path: str, argument: str) -> Recipe:
    runs = {}
    for name, config in loaded.runs.items():
        if not isinstance(config, ConfigDict):
            raise UserError(f"run {name} of {path} is a {type(config).__name__}: expected a ConfigDict, from default()")
        if not isinstance(name, str) or not name or set(name) & set("/\\@,*?[]") or name.startswith("."):
            raise UserError(f"{path} has a run {name!r}: expected a name that can be a folder's, without / @ , * ? [ ]")
        runs[name] = configs.finished(config, path, argument, name)
        for need in _named(config.init_from):
            if need not in runs and need in loaded.runs:
                raise UserError(f"run {name} of {path} starts from {need}, which comes later: expected it before")
            if need not in runs and "/" not in need:
                raise unknown_name(f"run in init_from of {name}", need, loaded.runs)
    labelled = {name for rows in (loaded.rows, loaded.oracles) for names in rows.values() for name in names}
    if labelled - runs.keys():
        raise unknown_name(f"run in the rows of {path}", min(labelled - runs.keys()), runs)
    named = {name for table in loaded.tables for line in table.lines for name in line.runs}
    if named - runs.keys():
        raise unknown_name(f"run in the tables of {path}", min(named - runs.keys()), runs)
    if loaded.paper.keys() - loaded.rows.keys():
        raise unknown_name(f"row in the paper's numbers of {path}", min(loaded.paper.keys() - loaded.rows.keys()),
                           loaded.rows)
    json.dumps(_content(loaded))  # what cannot be written is not carried out
    return dataclasses.replace(loaded, runs=runs)


def _named(init_from: str) -> list[str]:
    return [paths.source(text)[0] for text in paths.listed(init_from)]


def plan(recipe: Recipe, root: epath.Path) -> list[Planned]:
    """The runs in their places below `root`."""
    planned = []
    for name, config in recipe.runs.items():
        needs = tuple(need for need in _named(config.init_from) if need in recipe.runs)
        config = config.copy_and_resolve_references()
        config.init_from = ", ".join(_placed(text, recipe, root) for text in paths.listed(config.init_from))
        planned.append(Planned(name, config, root / name, needs))
    return planned


def _placed(text: str, recipe: Recipe, root: epath.Path) -> str:
    name, which = paths.source(text)
    return f"{root / name if name in recipe.runs else name}{which and f'@{which}'}"


def only(planned: Iterable[Planned], patterns: str) -> list[Planned]:
    """The runs that patterns with commas match, "nis-*,base"; all if there are none.

    Raises:
        UserError: nothing matches one.
    """
    planned = list(planned)
    if not patterns:
        return planned
    names = [run.name for run in planned]
    matched = set()
    for pattern in map(str.strip, patterns.split(",")):
        hits = set(fnmatch.filter(names, pattern))
        if not hits:
            raise unknown_name("run in --only", pattern, names)
        matched |= hits
    return [run for run in planned if run.name in matched]


def write(recipe: Recipe, root: epath.Path) -> None:
    """Writes what a report needs of a recipe to ROOT/recipe.json."""
    files.write_json(root / FILE, _content(recipe))


def _content(recipe: Recipe) -> dict[str, Any]:
    return {"title": recipe.title, "runs": list(recipe.runs), "rows": {k: list(v) for k, v in recipe.rows.items()},
            "paper": {k: dict(v) for k, v in recipe.paper.items()}, "notes": list(recipe.notes),
            "tables": [dataclasses.asdict(table) for table in recipe.tables],
            "oracles": {k: list(v) for k, v in recipe.oracles.items()}}


def read(root: epath.PathLike) -> dict[str, Any] | None:
    """What `write` wrote; None where there is no recipe.

    Raises:
        UserError: the file is damaged.
    """
    path = epath.Path(root) / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        tables = [_printed(table) for table in content.get("tables", ())]  # which older recipes do not have
        return {name: content[name] for name in ("title", "runs", "rows", "paper", "notes")} | {
            "tables": tables, "oracles": content.get("oracles", {})}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected what a recipe writes; the command that started the recipe "
                        "writes it again") from None


def _printed(stored: Mapping[str, Any]) -> Printed:
    """Of what JSON made of it, with tuples."""
    lines = tuple(Line(**{**line, "runs": tuple(line["runs"])}) for line in stored["lines"])
    return Printed(**{**stored, "columns": tuple(stored["columns"]), "lines": lines, "notes": tuple(stored["notes"])})
