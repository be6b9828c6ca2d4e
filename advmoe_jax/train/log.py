"""What training says: metrics.jsonl for programs, one line now and then for people."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from advmoe_jax.core import console, files, tables


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The metrics.jsonl of a workdir: one record a line with "step", "split" and values."""

    path: epath.Path

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Appends a record; arrays become lists."""
        if jax.process_index() == 0:
            record = {"step": step, "split": split} | {k: _plain(v) for k, v in values.items()}
            files.append_json_line(self.path, record)

    def read(self) -> list[dict[str, Any]]:
        """All whole records."""
        return files.read_json_lines(self.path)

    def cut_back(self, step: int) -> None:
        """Drops the records after `step`, which a resumed run writes again.

        A damaged file is set aside with a warning; the records before the damage stay.
        """
        if jax.process_index() == 0:
            records, whole = files.check_json_lines(self.path, {"step", "split"})
            if not whole:
                aside = self.path.with_name(f"{self.path.name}.damaged")
                self.path.replace(aside)
                console.warn(f"{self.path} is damaged and was moved to {aside}; {len(records)} records of it are kept")
            kept = [json.dumps(record) for record in records if record["step"] <= step]
            files.write_text(self.path, "".join(line + "\n" for line in kept))


def _plain(value: Any) -> Any:
    value = np.asarray(value)
    return np.round(value.astype(float), 6).tolist() if value.dtype.kind == "f" else value.tolist()


def means(window: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Mean of each metric over the iterations of a window."""
    names = dict.fromkeys(name for values in window for name in values)
    return {name: np.mean([values[name] for values in window if name in values], axis=0, dtype=np.float64)
            for name in names}


def by_update(means: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of an update, its metrics), in order of names, of metrics under "UPDATE/METRIC"."""
    for name in sorted({key.split("/")[0] for key in means if "/" in key}):
        yield name, {key.removeprefix(f"{name}/"): value for key, value in means.items() if key.startswith(f"{name}/")}


def line(step: int, total_steps: int, epoch: float, means: dict[str, Any], batch_size: int,
         progress: Callable[[dict[str, Any]], str]) -> str:
    """The progress line: step, speed, time left, and of each update loss, accuracies and what the model adds.

    Args:
        step, total_steps, epoch: where training is.
        means: metrics as `means` gives them, with "images_per_second".
        batch_size: images of an iteration.
        progress: the model's words for the metrics of an update; may be empty.
    """
    speed = means["images_per_second"]
    left = (total_steps - step) * batch_size / speed
    parts = [f"step {step}/{total_steps} (epoch {epoch:.1f})", f"{speed:.0f} images/s, {tables.duration(left)} left"]
    for name, values in by_update(means):
        words = [f"{name}: loss {values['loss']:.3f}"]
        words += [f"{key.upper()} {100 * values[key]:.1f} %" for key in ("sa", "ra") if key in values]
        parts.append(", ".join(filter(None, (*words, progress(values)))))
    return " | ".join(parts)
