"""The log of an evaluation in a folder, from which one that was stopped goes on."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError


def is_about(folder: epath.Path, about: dict[str, Any]) -> bool | None:
    """Whether what is in eval/<id> was measured on the same model, images and versions; None if nothing is there."""
    stored = epath.Path(folder) / "about.json"
    try:
        return json.loads(stored.read_text()) == json.loads(json.dumps(about)) if stored.exists() else None
    except ValueError:  # it is damaged
        return False


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

    def __init__(self, folder: epath.Path, about: dict[str, Any], writes: bool = True):
        self.folder, self._writes = epath.Path(folder), writes
        finished = (self.folder / "summary.json").exists()
        if not finished and is_about(self.folder, about) is False:
            raise UserError(f"{self.folder} holds an unfinished evaluation of another model, other images or versions: "
                            f"expected {', '.join(f'{k} {v}' for k, v in about.items())}; delete the folder to start "
                            "it anew")
        self._records, intact = files.check_json_lines(self.folder / "log.jsonl", {"attempt"})
        if writes and not intact:  # what comes behind the damage is measured again
            files.write_text(self.folder / "log.jsonl", "".join(f"{json.dumps(record)}\n" for record in self._records))
        whole = all(self._part(number).exists() for number in range(len(self._records)))
        if finished and not (whole and is_about(self.folder, about)):
            self._records = []
            if writes:
                aside = self.folder.with_name(f"{self.folder.name}.replaced")
                files.remove_folder(aside)
                self.folder.rename(aside)  # at once: what is half deleted could be taken for something else
                files.remove_folder(aside)
        if writes:
            files.write_json(self.folder / "about.json", about)

    def read(self) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """All that was added, oldest first."""
        for number, record in enumerate(self._records):
            try:
                with self._part(number).open("rb") as file, np.load(file) as arrays:
                    part = dict(arrays)
            except Exception:  # numpy raises what zipfile or its parser raised
                raise UserError(f"{self._part(number)} is damaged: delete {self.folder} to measure it again") from None
            yield record, part

    def add(self, record: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Keeps a record and its arrays: the line follows when the arrays are there."""
        if self._writes:
            files.write_npz(self._part(len(self._records)), arrays)
            files.append_json_line(self.folder / "log.jsonl", record)
        self._records.append(record)

    def finish(self) -> None:
        """Deletes the parts."""
        files.remove_folder(self.folder / "parts")

    def _part(self, number):
        return self.folder / "parts" / f"{number:05d}.npz"
