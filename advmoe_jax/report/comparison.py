"""Tables of several runs: one row for runs that differ only by the seed, and which differences are ties."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from advmoe_jax.core import config as configs
from advmoe_jax.core import tables
from advmoe_jax.core.tables import Table
from advmoe_jax.ops.statistics import wilson
from advmoe_jax.report import commands, runs
from advmoe_jax.report.runs import Run

_COLUMNS = ("method", "config", "seeds", "SA %, best", "RA %, best", "RA %, last", "MACs, M: pathway / router / total")


@dataclasses.dataclass
class _Group:
    """Measurements by one attack of runs that differ only by the seed: {checkpoint: {training seed: entry}}."""

    config: dict[str, Any]
    by_checkpoint: dict[str, dict[int, dict[str, Any]]] = dataclasses.field(
        default_factory=lambda: {name: {} for name in runs.CHECKPOINTS})

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [e for by_seed in self.by_checkpoint.values() for e in by_seed.values()]

    @property
    def method(self) -> str:
        return self.entries[0]["method"]

    @property
    def seeds(self) -> list[int]:
        return sorted({entry["train_seed"] for entry in self.entries})

    def rates(self, checkpoint: str, kind: str) -> list[float]:
        return [entry[kind] for entry in self.by_checkpoint[checkpoint].values()]

    @property
    def robust(self) -> tuple[float, int]:
        """Robust images of the best checkpoints, mean over seeds, and all images: the seeds share them, so that more
        seeds are not more images."""
        best = list(self.by_checkpoint["best"].values())
        return sum(e["ra"] * e["n"] for e in best) / max(len(best), 1), max((e["n"] for e in best), default=0)


def compare(found: Sequence[Run]) -> list[Table]:
    """Compares runs.

    Args:
        found: of any methods and seeds, evaluated or not. Of two with the same config and seed the first counts.
    Returns:
        A table for each attack, eps and set of images, best robust accuracy first, with a sentence on ties below it;
        then the runs that are not evaluated yet, if there are any.
    """
    groups: dict[tuple, dict[tuple, _Group]] = {}
    for run in found:
        config = _identity(run)
        counted: dict[tuple, dict[str, Any]] = {}
        for entry in run.entries:
            counted[runs.attack_key(entry), entry["checkpoint"]] = entry
        for (attack, checkpoint), entry in counted.items():
            if checkpoint in runs.CHECKPOINTS:
                same = (entry["method"], *entry["macs"].values(), *config.items())
                group = groups.setdefault(attack, {}).setdefault(same, _Group(config))
                group.by_checkpoint[checkpoint].setdefault(entry["train_seed"], entry)
    compared = [_table(list(groups[attack].values())) for attack in sorted(groups)]
    waiting = [(str(run.folder), run.config.name, "not evaluated yet") for run in found if not run.entries]
    return compared + ([Table("Runs without results", ("workdir", "config", "state"), waiting)] if waiting else [])


def _identity(run: Run) -> dict[str, Any]:
    """The fields of a config that runs of one row share."""
    fields = configs.flatten(run.config) | {"name": commands.without_seed(run.config.name)}
    return {k: v for k, v in fields.items() if k not in ("seed", "data.dir") and not k.startswith("eval.")}


def _table(groups: list[_Group]) -> Table:
    groups.sort(key=lambda g: g.robust[0] / max(g.robust[1], 1), reverse=True)
    names = _config_names(groups)
    rows = []
    for group, name in zip(groups, names):
        seeds, macs = group.seeds, group.entries[0]["macs"]
        rates = (tables.mean_and_deviation(group.rates(*which), len(seeds))
                 for which in (("best", "sa"), ("best", "ra"), ("last", "ra")))
        rows.append((group.method, name, f"{len(seeds)} ({', '.join(map(str, seeds))})", *rates,
                     " / ".join(tables.millions(macs[part]) for part in ("pathway", "router", "total"))))
    entries = [entry for group in groups for entry in group.entries]
    notes = ("Mean ± sample standard deviation over training seeds. " + runs.attack_settings(entries)
             + f" Evaluated in {runs.circumstances(entries)}.",
             *runs.warnings(entries), *filter(None, [_ties(groups, names)]))
    return Table(runs.attack_title(entries[0]), _COLUMNS, rows, notes)


def _config_names(groups: list[_Group]) -> list[str]:
    """The configs' names, and for configs of one name the fields in which they differ."""
    names = []
    for group in groups:
        others = [g.config for g in groups if g.config["name"] == group.config["name"]]
        told = [f"{k}={v}" for k, v in group.config.items() if any(other.get(k) != v for other in others)]
        names.append(" ".join((group.config["name"], *told)))
    return names


def _ties(groups: list[_Group], names: list[str]) -> str:
    """Which method has the best robust accuracy, and whose Wilson interval overlaps its own; "" for fewer than two."""
    methods = [group.method for group in groups]
    measured = [(group.method if methods.count(group.method) == 1 else f"{group.method} ({name})", *group.robust)
                for group, name in zip(groups, names) if group.robust[1]]
    if len(measured) < 2:
        return ""
    (best, robust, n), *others = measured
    low, high = wilson(round(robust), n)
    ties = [name for name, other, count in others if wilson(round(other), count)[1] >= low]
    verdict = f"a tie with {', '.join(ties)}: the intervals overlap" if ties else "no other interval overlaps its own"
    return (f"Best RA: {best}, {tables.with_interval(robust / n, (low, high))} by the Wilson 95 % interval of the "
            f"mean over seeds on {n} images; {verdict}.")
