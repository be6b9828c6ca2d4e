"""What `--mode report` writes: a report in a workdir, or tables of several."""

from collections.abc import Sequence
from pathlib import Path

from advmoe_jax.core import tables
from advmoe_jax.report import comparison, runs, workdir_report


def write(folders: Sequence[Path]) -> None:
    """Reports runs.

    Args:
        folders: of one workdir, report.md and its plots are written and its results printed. Of several, tables that
            compare them are printed: drawn in a terminal, as Markdown elsewhere; folders without a run are skipped.
    Raises:
        UserError: there is no run, or a file of one is damaged.
    """
    if len(folders) == 1:
        workdir_report.write(runs.load(folders[0]))
        return
    found = [runs.load(folder) for folder in folders if runs.is_run(folder)] or [runs.load(folders[0])]
    tables.show(comparison.compare(found))
