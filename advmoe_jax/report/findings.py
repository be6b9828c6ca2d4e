"""What a command that looks at finished runs leaves in a folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from advmoe_jax.core import files, tables
from advmoe_jax.core.tables import Table


def write(out: epath.Path, name: str, found: Mapping[str, Any], shown: Sequence[Table]) -> None:
    """Writes NAME.json and table.md.

    Args:
        out: the folder, which is made.
        name: of what was looked at, "routing".
        found: what JSON holds.
        shown: the same as tables.
    """
    files.write_json(out / f"{name}.json", found)
    files.write_text(out / "table.md", "\n".join(map(tables.markdown, shown)))


def show(out: epath.Path, names: Sequence[str], shown: Sequence[Table]) -> None:
    """Prints the tables, and where what was written is: a folder, and the names of files in it."""
    first, *others = names
    tables.show(shown)
    print(f"report: {', '.join([str(out / first), *others])}")
