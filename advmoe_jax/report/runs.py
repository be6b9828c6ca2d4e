"""A run as reports see it: its config, what was measured and what training said, all checked."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import files, tables
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import extra
from advmoe_jax.evaluation import results
from advmoe_jax.train import checkpoint

CHECKPOINTS = checkpoint.NAMES
ADAPTIVE = "RA %, adaptive"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
        folder: the workdir.
        config: its config.json.
        entries: measurements of results.json, those of the best checkpoint first, then the last; may be empty. Those of
            a routed model have "adaptive" too: the measurement by the adaptive suite on that checkpoint and budget, or
            None.
        metrics: records of metrics.jsonl, oldest first; may be empty.
    """

    folder: epath.Path
    config: ConfigDict
    entries: tuple[dict[str, Any], ...]
    metrics: tuple[dict[str, Any], ...]

    @property
    def epochs_per_step(self) -> float:
        """0 where nothing was trained."""
        last = next((r for r in reversed(self.metrics) if r["split"] == "train" and r["step"]), None)
        return last["epoch"] / last["step"] if last else 0.0


def is_run(folder: epath.Path) -> bool:
    """Whether there is a config.json."""
    return (epath.Path(folder) / "config.json").is_file()


def load(folder: epath.Path) -> Run:
    """Reads a workdir.

    Raises:
        UserError: it holds no run, or one of its files is damaged.
    """
    folder = epath.Path(folder)
    if not is_run(folder):
        raise UserError(f"no run in {folder}: it has no config.json")
    return Run(folder, configs.read(folder / "config.json"), _entries(folder), _metrics(folder / "metrics.jsonl"))


def _entries(folder: epath.Path) -> tuple[dict[str, Any], ...]:
    order, found = (*CHECKPOINTS, None), results.read(folder)
    return tuple(sorted((e | _adaptive(e, found) for e in found), key=lambda e: (
        order.index(e["checkpoint"] if e["checkpoint"] in CHECKPOINTS else None), e["step"])))


def _adaptive(entry, found):
    if "flip_rate" not in entry["facts"]:
        return {}
    same = [e for e in found if e["attack"] == "adaptive" and all(
        e[name] == entry[name] for name in ("checkpoint", "step", "norm", "eps_value"))]
    return {"adaptive": max(same, key=lambda e: e["n"], default=None)}


def _metrics(path: epath.Path) -> tuple[dict[str, Any], ...]:
    records, whole = files.check_json_lines(path, {"step", "split"})
    if not whole or not all(record.keys() >= ({"epoch"} if record["split"] == "train" else {"sa", "ra"})
                            for record in records):
        raise UserError(f"{path} is damaged: expected one record a line with step, split and epoch, or sa and ra; "
                        "delete it to report without training curves")
    return tuple(records)


def attack_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What two measurements have in common when the same attack was run on the same images."""
    settings = {k: v for k, v in entry["settings"].items() if k not in ("eps", "driver")}
    return (entry["data"], entry["norm"], entry["eps_value"], entry["attack"], entry["n"], json.dumps(settings))


def attack_title(entry: dict[str, Any]) -> str:
    """"pgd-50, linf eps 8/255, 10000 images of cifar10"; without a budget "fog, 10000 images of cifar10"."""
    budget = f"{entry['norm']} eps {entry['eps']}, " if entry["norm"] or entry["eps"] else ""
    return f"{entry['attack']}, {budget}{entry['n']} test images of {entry['data']}"


def attack_settings(entries: Sequence[dict[str, Any]]) -> str:
    """The settings that the title of these does not say, "restarts 1, ... step_size 2.5 eps/steps", and the seeds."""
    said = ("norm", "eps", "driver")
    words = [f"{k} {v}" for k, v in sorted(entries[0]["settings"].items()) if k not in said]
    return f"Attack: {', '.join(words)}, seed {' and '.join(dict.fromkeys(str(e['seed']) for e in entries))}."


def adaptive(entries: Sequence[dict[str, Any]]) -> str:
    """RA by the adaptive suite, a cell beside other attacks on routed models, whose routers may hide the slope; mean
    over the entries of a row."""
    if not any("adaptive" in entry for entry in entries):
        return tables.NOTHING
    found = [entry["adaptive"] for entry in entries if entry.get("adaptive")]
    if not found:
        return "not measured"
    counts = sorted({e["n"] for e in found} - {entries[0]["n"]})
    return tables.mean_and_deviation([e["ra"] for e in found], len(entries)) + "".join(f" (n={n})" for n in counts)


def named(label: str, run: Run) -> str:
    """What to call a row of a run: its label, and the extra data that it had, if any."""
    return extra.marked(label, extra.about(run.config.data))


def tracks(rows: Iterable[tuple[str, Run]]) -> tuple[str, ...]:
    """A note below a table, or none: which of its rows had extra data. Rows are names as shown, each with a run."""
    found = dict.fromkeys(name for name, run in rows if extra.about(run.config.data))
    return (f"A track of its own, trained on more than the data set's images: {'; '.join(found)}.",) if found else ()


def shows_adaptive(entries: Sequence[dict[str, Any]]) -> bool:
    """Whether a table of one attack needs that column."""
    return entries[0]["attack"] != "adaptive" and any("adaptive" in entry for entry in entries)


def circumstances(entries: Iterable[dict[str, Any]]) -> str:
    """Precision, backend and versions: "float32 (attacks: default) on cpu; advmoe_jax 0.1.0, jax 0.10.2"."""
    def words(entry):
        precision, versions = entry["precision"], entry["versions"]
        return (f"{precision['verdicts']} (attacks: {precision['attacks']}) on {entry['backend']}; "
                + ", ".join(f"{k} {v}" for k, v in versions.items()))

    return " and ".join(dict.fromkeys(map(words, entries)))


def warnings(entries: Iterable[dict[str, Any]], notes: bool = False) -> tuple[str, ...]:
    """What a reader must know of these numbers: why they are unreliable or unchecked, and with `notes` what else was
    noticed; the checkpoint was chosen on test images; labels steer the routing."""
    entries = tuple(entries)
    on_test = dict.fromkeys(e["method"] for e in entries if e["selected_on"] == "test" and e["checkpoint"] == "best")
    steered = any("label_mod" in e["method"] for e in entries)
    noticed = [flag for e in entries for flag in e["flags"]
               if flag["unreliable"] or notes or flag["name"] == "not_checked"]
    told = dict.fromkeys(f"{'UNRELIABLE' if of['unreliable'] else 'Note'}: {of['reason']}." for of in noticed)
    return tuple(filter(None, (
        *sorted(told, reverse=True),
        on_test and f"Optimistic: the best checkpoint was chosen on test images ({', '.join(on_test)}).",
        steered and "Trained with label_mod: labels steer the routing.")))
