"""results.json: the index of everything that was measured in a workdir, and the details beside it."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError

SCHEMA = 1
FIELDS = frozenset((
    "id", "checkpoint", "step", "seed", "train_seed", "config", "method", "selected_on", "data", "macs", "precision",
    "backend", "versions", "attack", "norm", "eps", "eps_value", "settings", "n", "sa", "sa_interval", "ra",
    "ra_interval", "ra_by_view"))
"""What every measurement says of itself; those of routed models add load, load_entropy and flip_rate."""


def entry_id(record: dict[str, Any]) -> str:
    """The folder name of a measurement: checkpoint, attack, norm, eps, number of images, seed, and a short hash of
    all the attack's settings, which tells pgd-50 with one restart from pgd-50 with five."""
    parts = [record[k] for k in ("checkpoint", "attack", "norm", "eps", "n", "seed")]
    settings = zlib.crc32(json.dumps(record["settings"], sort_keys=True).encode())
    return re.sub(r"[^\w.-]+", "_", "-".join(map(str, (*parts, f"{settings:08x}"))))


def read(workdir: Path) -> list[dict[str, Any]]:
    """All measurements of a workdir, oldest first.

    Raises:
        UserError: the file is damaged.
    """
    path, advice = Path(workdir) / "results.json", "delete it and run --mode evaluate again"
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())["entries"]
        missing = [(i, name) for i, entry in enumerate(entries) for name in sorted(FIELDS - entry.keys())]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: {advice}") from None
    if missing:
        index, name = missing[0]
        raise UserError(f"{path} is damaged: entry {index} has no {name!r}; {advice}")
    return entries


def add(workdir: Path, records: list[dict[str, Any]], examples: list[dict[str, np.ndarray]]) -> None:
    """Adds measurements; one of the same id is replaced.

    Args:
        workdir: holds results.json and eval/<id>/.
        records: one a measurement.
        examples: for each, arrays with one row an image, kept as examples.npz.
    """
    entries = {entry["id"]: entry for entry in read(workdir)}
    for record, arrays in zip(records, examples):
        record = {"id": entry_id(record)} | record
        folder = Path(workdir) / "eval" / record["id"]
        files.write_npz(folder / "examples.npz", arrays)
        files.write_json(folder / "summary.json", record)
        entries.pop(record["id"], None)
        entries[record["id"]] = record
    files.write_json(Path(workdir) / "results.json", {"schema": SCHEMA, "entries": list(entries.values())})
