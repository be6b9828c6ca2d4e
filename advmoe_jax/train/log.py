"""What a run says: metrics.jsonl for programs, one line now and then for people. Process 0 speaks."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.text

from advmoe_jax.core import files


def say(text: str) -> None:
    """Prints a line, once in a cluster."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a warning to stderr, once in a cluster."""
    if jax.process_index() == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def alarm(text: str) -> None:
    """Prints a line to stderr, in red in a terminal, once in a cluster."""
    if jax.process_index() == 0:
        rich.console.Console(stderr=True, soft_wrap=True, highlight=False).print(rich.text.Text(text, "bold red"))


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The metrics.jsonl of a workdir: one record a line with "step", "split" and values."""

    path: Path

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Appends a record; arrays become lists."""
        if jax.process_index() == 0:
            record = {"step": step, "split": split} | {k: _plain(v) for k, v in values.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole records."""
        return files.read_json_lines(self.path)

    def cut_back(self, step: int) -> None:
        """Drops the records after `step`, which a resumed run writes again."""
        if jax.process_index() == 0:
            kept = [json.dumps(r) for r in self.read() if r["step"] <= step]
            files.write_text(self.path, "".join(line + "\n" for line in kept))


def _plain(value: Any) -> Any:
    value = np.asarray(value)
    return np.round(value.astype(float), 6).tolist() if value.dtype.kind == "f" else value.tolist()


def means(window: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Mean of each metric over the iterations of a window."""
    names = dict.fromkeys(name for values in window for name in values)
    return {name: np.mean([values[name] for values in window if name in values], axis=0, dtype=np.float64)
            for name in names}


def line(step: int, total_steps: int, epoch: float, means: dict[str, Any], batch_size: int) -> str:
    """The progress line: step, speed, time left, losses, accuracies, expert load and flips per layer."""
    speed = means["images_per_second"]
    left = (total_steps - step) * batch_size / speed
    parts = [f"step {step}/{total_steps} epoch {epoch:.1f}", f"{speed:.0f} img/s, {duration(left)} left"]
    for name in sorted({key.split("/")[0] for key in means if "/" in key}):
        def of(key, name=name):
            return means.get(f"{name}/{key}")
        text = f"{name} loss {of('loss'):.3f}"
        if of("sa") is not None:
            text += f" SA {100 * of('sa'):.1f}"
        if of("ra") is not None:
            text += f" RA {100 * of('ra'):.1f}"
        if of("load_entropy") is not None:
            text += f" load {digits(of('load_entropy'))}"
        if of("flip_rate") is not None:
            text += f" flips {digits(of('flip_rate'))}"
        parts.append(text)
    return " | ".join(parts)


def digits(rates: Any) -> str:
    """Rates in [0, 1], one per layer, as tenths: 0.98 is 9, 0.12 is 1."""
    return "".join(str(min(9, int(10 * rate))) for rate in np.atleast_1d(rates))


def duration(seconds: float) -> str:
    """3725 -> "1h02m"."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes}m{seconds:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
