"""Tables of text: as Markdown for files, by rich for terminals, and how numbers are written in them."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence

import numpy as np

NOTHING = "-"
"""What a cell holds where there is no number."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with what stands above and below it.

    Attributes:
        title: one line above it.
        columns: names.
        rows: cells, as many a row as there are columns.
        notes: paragraphs below it.
        varying: columns that depend on the attack, shown for each one where tables of several stand as one.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    varying: tuple[str, ...] = ()


def markdown(table: Table, level: int = 3) -> str:
    """A heading of this level, the table with its columns aligned, and the notes; ends with a newline."""
    lines = [tuple(cell.replace("|", "\\|") for cell in line) for line in (table.columns, *table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    grid = "\n".join(f"| {' | '.join(cell.ljust(w) for cell, w in zip(line, widths))} |" for line in lines)
    return "\n\n".join((f"{'#' * level} {table.title}", grid, *table.notes)) + "\n"


def show(tables: Iterable[Table], *, as_text: bool | None = None) -> None:
    """Prints tables to stdout.

    Args:
        tables: what to print.
        as_text: as Markdown; else drawn by rich. Unless given, Markdown wherever stdout is not a terminal.
    """
    if not sys.stdout.isatty() if as_text is None else as_text:
        print("\n".join(markdown(table) for table in tables), end="")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 160)
    for table in tables:
        drawn = Drawn(title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for column in table.columns:
            drawn.add_column(Text(column), overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        for note in table.notes:
            console.print(Text(note))


def percent(rate: float) -> str:
    """0.5123 -> "51.23"."""
    return decimals(100 * rate)


def decimals(value: float) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def with_interval(rate: float, interval: Sequence[float]) -> str:
    """0.5, (0.45, 0.55) -> "50.00 [45.00, 55.00]"."""
    return f"{percent(rate)} [{percent(interval[0])}, {percent(interval[1])}]"


def mean_and_deviation(rates: Sequence[float], expected: int) -> str:
    """Mean ± sample standard deviation in percent.

    Args:
        rates: fractions in [0, 1]; of one there is no deviation, of none no mean.
        expected: how many there should be; fewer are said.
    """
    if not len(rates):
        return NOTHING
    text = percent(float(np.mean(rates)))
    if len(rates) > 1:
        text += f" ± {percent(float(np.std(rates, ddof=1)))}"
    return text + (f" ({len(rates)} of {expected})" if len(rates) < expected else "")


def millions(count: int) -> str:
    """139299328 -> "139.30"."""
    return decimals(count / 1e6)


def duration(seconds: float) -> str:
    """3725 -> "1h02m"."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
