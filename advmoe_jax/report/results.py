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
    path = Path(workdir) / "results.json"
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): expected a JSON object with entries; move it away") from None


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
