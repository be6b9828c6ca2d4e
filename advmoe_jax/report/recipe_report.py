"""ROOT/report.md of a recipe: its rows beside each other, with a paper's numbers, and its runs."""

from collections.abc import Mapping

import numpy as np
from etils import epath

from advmoe_jax.core import files, recipe, status, tables
from advmoe_jax.core.tables import Table
from advmoe_jax.report import comparison, criteria, kept, matrix, plots, printed, runs


def write(root: epath.Path) -> None:
    """Writes report.md and a plot for each attack beside the runs, and prints the tables.

    Raises:
        UserError: the folder holds no recipe, or a file of it is damaged.
    """
    stored = recipe.read(root)
    folders = {name: root / name for name in stored["runs"]}
    of_name = {name: runs.load(folder) for name, folder in folders.items() if runs.is_run(folder)}
    found = list(of_name.values())
    labels = {str(folders[name]): label for label, names in stored["rows"].items() for name in names}
    shown = comparison.compare(found, labels, stored["paper"])
    parts = [f"# {stored['title'] or root.name}\n"]
    of_paper = [printed.table(table, of_name) for table in stored["tables"]]
    for number, (table, scores) in enumerate(of_paper):
        parts += [tables.markdown(table), *_bars(root, f"table{number}.png", scores)]
    parts += map(tables.markdown, shown)
    for number, groups in enumerate(comparison.groups_of(found, labels).values()):
        drawn = [group for group in groups if group.rates("best", "ra")]
        name = f"rows{number or ''}.png"
        rates = [(100 * np.mean(r), 100 * np.std(r, ddof=1) if len(r) > 1 else 0.0)
                 for r in (group.rates("best", "ra") for group in drawn)]
        paper = [stored["paper"].get(group.label, {}).get("RA") for group in drawn]
        if drawn and plots.write_rows(root / name, [group.method for group in drawn], rates, paper):
            parts.append(f"![{runs.attack_title(drawn[0].entries[0])}]({name})\n")
    for number, of in enumerate(criteria.compared(found, labels) if not of_paper else ()):
        parts += map(tables.markdown, filter(None, (criteria.best_table(of), criteria.rank_table(of))))
        parts += _bars(root, f"criteria{number or ''}.png", {group.label: group.means() for group in of.groups})
    for number, found_matrix in enumerate(matrix.of(found, labels, stored["oracles"], stored["paper"])):
        parts.append(tables.markdown(found_matrix.table))
        name = f"matrix{number or ''}.png"
        if plots.write_matrix(root / name, found_matrix.rows, found_matrix.columns, found_matrix.rates):
            parts.append(f"![{found_matrix.table.title}]({name})\n")
    for number, pool in enumerate(kept.of(root, of_name)):
        parts.append(tables.markdown(pool.table))
        name = f"kept{number or ''}.png"
        if plots.write_matrix(root / name, pool.layers, pool.runs, pool.shares, "kept weights (%)", is_log=True):
            parts.append(f"![{pool.table.title}]({name})\n")
    parts += [f"{note}\n" for note in stored["notes"]] + [tables.markdown(_runs(folders), 2)]
    files.write_text(root / "report.md", "\n".join(parts))
    tables.show([table for table, _ in of_paper] + shown, as_text=False)
    print(f"report: {root / 'report.md'}")


def _bars(root: epath.Path, name: str, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The line that shows the bars of superscores, {label: {criterion: score}}, where there are any."""
    drawn = scores and plots.write_superscores(root / name, list(scores), list(scores.values()))
    return [f"![superscores]({name})\n"] if drawn else []


def _runs(folders: dict[str, epath.Path]) -> Table:
    rows = []
    for name, folder in folders.items():
        of = status.read(folder)
        report = f"[report]({name}/report.md)" if (folder / "report.md").exists() else ""
        rows.append((name, of.state, tables.duration(of.seconds) if of.seconds else "", report))
    return Table("Runs", ("run", "state", "time", ""), rows)
