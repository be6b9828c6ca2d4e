"""ROOT/report.md of a recipe: its rows beside each other, with a paper's numbers, and its runs."""

import numpy as np
from etils import epath

from advmoe_jax.core import files, recipe, status, tables
from advmoe_jax.core.tables import Table
from advmoe_jax.report import comparison, matrix, plots, runs


def write(root: epath.Path) -> None:
    """Writes report.md and a plot for each attack beside the runs, and prints the tables.

    Raises:
        UserError: the folder holds no recipe, or a file of it is damaged.
    """
    stored = recipe.read(root)
    folders = {name: root / name for name in stored["runs"]}
    found = [runs.load(folder) for folder in folders.values() if runs.is_run(folder)]
    labels = {str(folders[name]): label for label, names in stored["rows"].items() for name in names}
    shown = comparison.compare(found, labels, stored["paper"])
    parts = [f"# {stored['title'] or root.name}\n", *map(tables.markdown, shown)]
    for number, groups in enumerate(comparison.groups_of(found, labels).values()):
        drawn = [group for group in groups if group.rates("best", "ra")]
        name = f"rows{number or ''}.png"
        rates = [(100 * np.mean(r), 100 * np.std(r, ddof=1) if len(r) > 1 else 0.0)
                 for r in (group.rates("best", "ra") for group in drawn)]
        paper = [stored["paper"].get(group.label, {}).get("RA") for group in drawn]
        if drawn and plots.write_rows(root / name, [group.method for group in drawn], rates, paper):
            parts.append(f"![{runs.attack_title(drawn[0].entries[0])}]({name})\n")
    for number, found_matrix in enumerate(matrix.of(found, labels, stored["oracles"], stored["paper"])):
        parts.append(tables.markdown(found_matrix.table))
        name = f"matrix{number or ''}.png"
        if plots.write_matrix(root / name, found_matrix.rows, found_matrix.columns, found_matrix.rates):
            parts.append(f"![{found_matrix.table.title}]({name})\n")
    parts += [f"{note}\n" for note in stored["notes"]] + [tables.markdown(_runs(folders), 2)]
    files.write_text(root / "report.md", "\n".join(parts))
    tables.show(shown, as_text=False)
    print(f"report: {root / 'report.md'}")


def _runs(folders: dict[str, epath.Path]) -> Table:
    rows = []
    for name, folder in folders.items():
        of = status.read(folder)
        report = f"[report]({name}/report.md)" if (folder / "report.md").exists() else ""
        rows.append((name, of.state, tables.duration(of.seconds) if of.seconds else "", report))
    return Table("Runs", ("run", "state", "time", ""), rows)
