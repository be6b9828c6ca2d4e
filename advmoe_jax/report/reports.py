"""What `--mode report` writes: the report of a run or of a recipe, or tables of several runs."""

from collections.abc import Sequence

from etils import epath

from advmoe_jax.core import recipe, tables
from advmoe_jax.report import comparison, recipe_report, runs, workdir_report


def write_run(folder: epath.Path) -> None:
    """Writes report.md and its plots into a workdir, and prints its results."""
    workdir_report.write(runs.load(folder))


def write(folders: Sequence[epath.Path]) -> None:
    """Reports runs.

    Args:
        folders: of one workdir or recipe, report.md and its plots are written and its results printed. Of several,
            tables that compare them are printed: drawn in a terminal, as Markdown elsewhere; folders without a run are
            skipped.
    Raises:
        UserError: there is no run, or a file of one is damaged.
    """
    if len(folders) == 1:
        if recipe.read(folders[0]) is not None:
            return recipe_report.write(folders[0])
        return write_run(folders[0])
    found = [runs.load(folder) for folder in folders if runs.is_run(folder)] or [runs.load(folders[0])]
    tables.show(comparison.compare(found))
