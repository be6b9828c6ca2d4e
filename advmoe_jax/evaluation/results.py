"""results.json: the index of everything that was measured in a workdir, and the details beside it."""

import csv
import io
import json
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import examples
from advmoe_jax.evaluation.verdicts import Found

SCHEMA = 3  # 1 had no "asked", 2 no "facts"
PICTURES = "pictures.npz"
FIELDS = {name: kind for kind, names in (
    (str, ("id", "checkpoint", "config", "method", "selected_on", "data", "backend", "attack", "norm", "eps")),
    (int, ("step", "seed", "train_seed", "n")), (float, ("eps_value", "sa", "ra")), (bool, ("unreliable",)),
    (list, ("sa_interval", "ra_interval", "attempts", "flags", "fact_tables")),
    (dict, ("macs", "precision", "versions", "settings", "asked", "ra_by_view", "facts"))) for name in names}
"""What every measurement says of itself, and of which type; "facts" and their tables are the model's."""


def entry_id(record: dict[str, Any]) -> str:
    """The folder name of a measurement: checkpoint, attack, norm, eps, number of images, seed, and a short hash of
    all the attack's settings, which tells pgd-50 with one restart from pgd-50 with five."""
    parts = [record[k] for k in ("checkpoint", "attack", "norm", "eps", "n", "seed")]
    settings = zlib.crc32(json.dumps(record["settings"], sort_keys=True).encode())
    return re.sub(r"[^\w.-]+", "_", "-".join(map(str, (*parts, f"{settings:08x}"))))


def is_kept(workdir: epath.PathLike) -> bool:
    """Whether anything was measured."""
    return (epath.Path(workdir) / "results.json").exists()


def read(workdir: epath.Path) -> list[dict[str, Any]]:
    """All measurements of a workdir, oldest first.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path, advice = epath.Path(workdir) / "results.json", "move it away and run --mode evaluate again"
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        schema, entries = stored["schema"], stored["entries"]
        if schema != SCHEMA:
            raise UserError(f"{path} is of another version (schema {schema}, expected {SCHEMA}): {advice}")
        wrong = [(i, name) for i, entry in enumerate(entries) for name, kind in FIELDS.items()
                 if not isinstance(entry.get(name), int | float if kind is float else kind)]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: {advice}") from None
    if wrong:
        index, name = wrong[0]
        raise UserError(f"{path} is damaged: entry {index} has no {name!r} that could be; {advice}")
    return entries


def add(workdir: epath.Path, records: Sequence[dict[str, Any]]) -> None:
    """Adds measurements to the index; one of the same id is replaced."""
    entries = {entry["id"]: entry for entry in read(workdir)}
    for record in records:
        record = {"id": entry_id(record)} | record
        entries.pop(record["id"], None)
        entries[record["id"]] = record
    files.write_json(epath.Path(workdir) / "results.json", {"schema": SCHEMA, "entries": list(entries.values())})


def keep(workdir: epath.Path, record: dict[str, Any], found: Found, adversarial: dict[str, np.ndarray],
         pictures: dict[str, np.ndarray]) -> None:
    """Writes the details of a measurement to eval/<id>/, and adds it to the index.

    Args:
        workdir: holds results.json and eval/.
        record: what was measured.
        found: for examples.npz and examples.csv.
        adversarial: {"index", "x_adv"} of the images that were broken, for adversarial.npz.
        pictures: for pictures.npz, see verdicts.pictures; {}: there are none.
    """
    folder = epath.Path(workdir) / "eval" / entry_id(record)
    files.write_npz(folder / "examples.npz", examples.examples(found))
    files.write_npz(folder / "adversarial.npz", adversarial)
    if pictures:
        files.write_npz(folder / PICTURES, pictures)
    files.write_text(folder / "examples.csv", examples.table(found))
    files.write_text(folder / "summary.csv", _summary(record))
    if record["attack"] == "standard":
        files.write_json(folder / "robustbench.json", _robustbench(record))
    files.write_json(folder / "summary.json", {"id": entry_id(record)} | record)
    add(workdir, [record])


def _summary(record: dict[str, Any]) -> str:
    """The attempts as CSV."""
    out = io.StringIO()
    names = dict.fromkeys(name for attempt in record["attempts"] for name in attempt if name != "settings")
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(record["attempts"])
    return out.getvalue()


def _robustbench(record: dict[str, Any]) -> dict[str, Any]:
    """A model's entry as RobustBench keeps it: numbers as text, accuracies in percent."""
    return {
        "link": "", "name": f"{record['method']} ({record['config']})", "authors": "", "additional_data": False,
        "number_forward_passes": 1, "dataset": record["data"], "venue": "", "architecture": record["method"],
        "eps": record["eps"], "clean_acc": f"{100 * record['sa']:.2f}", "reported": f"{100 * record['ra']:.2f}",
        "autoattack_acc": f"{100 * record['ra']:.2f}", "unreliable": record["unreliable"],
        "footnote": f"{record['n']} test images, {record['norm']}, seed {record['seed']}, advmoe_jax "
                    f"{record['versions']['advmoe_jax']}"}
