"""results.json: the index of everything that was measured in a workdir, and the details beside it."""

import csv
import io
import json
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_jax.attacks.verdicts import Found
from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError

SCHEMA = 2  # 1 had no "asked"
FIELDS = frozenset((
    "id", "checkpoint", "step", "seed", "train_seed", "config", "method", "selected_on", "data", "macs", "precision",
    "backend", "versions", "attack", "norm", "eps", "eps_value", "settings", "asked", "n", "sa", "sa_interval", "ra",
    "ra_interval", "ra_by_view", "attempts", "flags", "unreliable"))
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
        UserError: the file is damaged, or of another version.
    """
    path, advice = Path(workdir) / "results.json", "move it away and run --mode evaluate again"
    if not path.exists():
        return []
    try:
        stored = json.loads(path.read_text())
        schema, entries = stored["schema"], stored["entries"]
        if schema != SCHEMA:
            raise UserError(f"{path} is of another version (schema {schema}, expected {SCHEMA}): {advice}")
        missing = [(i, name) for i, entry in enumerate(entries) for name in sorted(FIELDS - entry.keys())]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: {advice}") from None
    if missing:
        index, name = missing[0]
        raise UserError(f"{path} is damaged: entry {index} has no {name!r}; {advice}")
    return entries


def is_about(folder: Path, about: dict[str, Any]) -> bool | None:
    """Whether what is in eval/<id> was measured on the same model, images and versions; None if nothing is there."""
    stored = Path(folder) / "about.json"
    return json.loads(stored.read_text()) == json.loads(json.dumps(about)) if stored.exists() else None


class FileLog:
    """A verdicts.Log in a folder: log.jsonl, and parts/ with the arrays of each of its lines.

    What a finished evaluation left is replaced.

    Args:
        folder: eval/<id> of a workdir.
        about: what is evaluated: the step, hashes of the weights and of the images, versions.
        writes: whether this process writes, one of a cluster does, and before others look.
    Raises:
        UserError: the folder holds an unfinished evaluation of something else.
    """

    def __init__(self, folder: Path, about: dict[str, Any], writes: bool = True):
        self.folder, self._writes = Path(folder), writes
        finished = (self.folder / "summary.json").exists()
        if not finished and is_about(self.folder, about) is False:
            raise UserError(f"{self.folder} holds an unfinished evaluation of another model, other images or versions: "
                            f"expected {', '.join(f'{k} {v}' for k, v in about.items())}; delete the folder to start "
                            "it anew")
        self._records = files.read_json_lines(self.folder / "log.jsonl")
        whole = all(self._part(number).exists() for number in range(len(self._records)))
        if finished and not (whole and is_about(self.folder, about)):
            self._records = []
            if writes:
                aside = self.folder.with_name(f"{self.folder.name}.replaced")
                shutil.rmtree(aside, ignore_errors=True)
                self.folder.rename(aside)  # at once: what is half deleted could be taken for something else
                shutil.rmtree(aside)
        if writes:
            files.write_json(self.folder / "about.json", about)

    def read(self) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """All that was added, oldest first."""
        for number, record in enumerate(self._records):
            with np.load(self._part(number)) as arrays:
                yield record, dict(arrays)

    def add(self, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Keeps a record and its arrays: the line follows when the arrays are there."""
        if self._writes:
            files.write_npz(self._part(len(self._records)), arrays)
            files.append_json_line(self.folder / "log.jsonl", record)
        self._records.append(record)

    def finish(self) -> None:
        """Deletes the parts."""
        shutil.rmtree(self.folder / "parts", ignore_errors=True)

    def _part(self, number):
        return self.folder / "parts" / f"{number:05d}.npz"


def examples(found: Found) -> dict[str, np.ndarray]:
    """What happened to each image: arrays with one row an image, or one row an attempt and a column an image.

    `broken_by` is the number of the first attempt that broke the image, -1 where none did and -2 where it was
    misclassified when clean.
    """
    called = {"label": "prediction", "ids": "experts"}
    arrays = {"index": found.index, "label": found.label, "broken_by": broken_by(found),
              **{f"clean_{called.get(name, name)}": values for name, values in found.clean.items()}}
    names = [name for name in (found.attempts[0].after if found.attempts else ())
             if all(name in attempt.after for attempt in found.attempts)]
    return arrays | {f"adversarial_{called.get(name, name)}": np.stack([
        attempt.after[name] for attempt in found.attempts]) for name in names}


def broken_by(found: Found) -> np.ndarray:
    """(m,) see `examples`."""
    first = np.where(found.correct, -1, -2)
    for number, attempt in reversed(list(enumerate(found.attempts))):
        first[found.correct & ~found.survivors([attempt])] = number
    return first


def table(found: Found) -> str:
    """`examples` as CSV, one line an image, with what the attempt that broke it did, or the last one that tried."""
    names = ("index", "label", "clean_prediction", "clean_margin", "broken_by", "view", "adversarial_prediction",
             "adversarial_margin", "linf", "l2", "l1", "l0", "experts_clean", "experts_adversarial")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for row, number in enumerate(broken_by(found)):
        tried = [n for n, attempt in enumerate(found.attempts) if attempt.attacked[row]]
        attempt = found.attempts[number if number >= 0 else tried[-1]] if tried else None
        after = {name: values[row] for name, values in (attempt.after if attempt else found.clean).items()}
        writer.writerow((
            found.index[row], found.label[row], found.clean["label"][row], f"{found.clean['margin'][row]:.6g}",
            {-1: "", -2: "clean"}.get(int(number), attempt and attempt.spec.label), attempt.view if attempt else "",
            after["label"], f"{after['margin']:.6g}",
            *(f"{after.get(norm, 0):.6g}" for norm in ("linf", "l2", "l1", "l0")),
            *(" ".join(map(str, ids[row])) if ids is not None else "" for ids in (
                found.clean.get("ids"), attempt.after.get("ids") if attempt else found.clean.get("ids")))))
    return out.getvalue()


def add(workdir: Path, records: Sequence[dict[str, Any]]) -> None:
    """Adds measurements to the index; one of the same id is replaced."""
    entries = {entry["id"]: entry for entry in read(workdir)}
    for record in records:
        record = {"id": entry_id(record)} | record
        entries.pop(record["id"], None)
        entries[record["id"]] = record
    files.write_json(Path(workdir) / "results.json", {"schema": SCHEMA, "entries": list(entries.values())})


def keep(workdir: Path, record: dict[str, Any], found: Found, adversarial: dict[str, np.ndarray]) -> None:
    """Writes the details of a measurement to eval/<id>/, and adds it to the index.

    Args:
        workdir: holds results.json and eval/.
        record: what was measured.
        found: for examples.npz and examples.csv.
        adversarial: {"index", "x_adv"} of the images that were broken, for adversarial.npz.
    """
    folder = Path(workdir) / "eval" / entry_id(record)
    files.write_npz(folder / "examples.npz", examples(found))
    files.write_npz(folder / "adversarial.npz", adversarial)
    files.write_text(folder / "examples.csv", table(found))
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
