"""Tables of several runs: one row for runs that differ only by the seed, and which differences are ties."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from advmoe_jax.core import config as configs
from advmoe_jax.core import tables
from advmoe_jax.core.tables import Table
from advmoe_jax.ops.statistics import wilson
from advmoe_jax.report import runs
from advmoe_jax.report.runs import Run

_COLUMNS = ("method", "config", "seeds", "SA %, best", "RA %, best", "RA %, last", "MACs, M: pathway / router / total")


@dataclasses.dataclass
class Group:
    """Measurements by one attack of runs that differ only by the seed: {checkpoint: {training seed: entry}}. `run` is
    the first of these."""

    run: Run
    label: str = ""
    by_checkpoint: dict[str, dict[int, dict[str, Any]]] = dataclasses.field(
        default_factory=lambda: {name: {} for name in runs.CHECKPOINTS})

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [e for by_seed in self.by_checkpoint.values() for e in by_seed.values()]

    @property
    def config(self) -> dict[str, Any]:
        return identity(self.run)

    @property
    def method(self) -> str:
        """What the row is called; extra data are part of it."""
        return runs.named(self.label, self.run) if self.label else self.entries[0]["method"]

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


def groups_of(found: Sequence[Run], labels: Mapping[str, str] = MappingProxyType({})) -> dict[tuple, list[Group]]:
    """{attack: rows}, runs that differ only by the seed, or share a label, being one row.

    Args:
        found: of any methods and seeds, evaluated or not. Of two with the same config and seed the first counts.
        labels: {workdir: label of its row}.
    """
    groups: dict[tuple, dict[tuple, Group]] = {}
    for run in found:
        label = labels.get(str(run.folder), "")
        counted = {(runs.attack_key(entry), entry["checkpoint"]): entry for entry in run.entries}
        for (attack, checkpoint), entry in counted.items():
            if checkpoint in runs.CHECKPOINTS:
                same = (runs.named(label, run),) if label else (
                    entry["method"], *entry["macs"].values(), *identity(run).items())
                group = groups.setdefault(attack, {}).setdefault(same, Group(run, label))
                group.by_checkpoint[checkpoint].setdefault(entry["train_seed"], entry)
    return {attack: sorted(groups[attack].values(), key=lambda g: g.robust[0] / max(g.robust[1], 1), reverse=True)
            for attack in sorted(groups)}


def compare(found: Sequence[Run], labels: Mapping[str, str] = MappingProxyType({}),
            paper: Mapping[str, Mapping[str, float]] = MappingProxyType({})) -> list[Table]:
    """Compares runs.

    Args:
        found, labels: as `groups_of`.
        paper: {label: {"SA": percent, "RA": percent}}, shown beside.
    Returns:
        A table for each attack, eps and set of images, best robust accuracy first, with a sentence on ties below it;
        then the runs that are not evaluated yet, if there are any.
    """
    compared = [_table(of_attack, paper) for of_attack in groups_of(found, labels).values()]
    waiting = [(str(run.folder), run.config.name, "not evaluated yet") for run in found if not run.entries]
    return compared + ([Table("Runs without results", ("workdir", "config", "state"), waiting)] if waiting else [])


def identity(run: Run) -> dict[str, Any]:
    """The fields of a config that runs of one row share."""
    own = ("seed", "data.dir", "name", "run")
    return {k: v for k, v in configs.flatten(run.config).items() if k not in own and not k.startswith("eval.")}


def _table(groups: list[Group], paper: Mapping[str, Mapping[str, float]]) -> Table:
    names = _config_names(groups)
    entries = [entry for group in groups for entry in group.entries]
    shown = runs.shows_adaptive(entries)
    rows, told = [], [kind for kind in ("SA", "RA") if any(kind in numbers for numbers in paper.values())]
    for group, name in zip(groups, names):
        seeds, macs = group.seeds, group.entries[0]["macs"]
        rates = (tables.mean_and_deviation(group.rates(*which), len(seeds))
                 for which in (("best", "sa"), ("best", "ra"), ("last", "ra")))
        rows.append((group.method, name, f"{len(seeds)} ({', '.join(map(str, seeds))})", *rates,
                     *([runs.adaptive(list(group.by_checkpoint["best"].values()) or group.entries)] if shown else []),
                     " / ".join(tables.millions(macs[part]) for part in ("pathway", "router", "total")),
                     *(tables.decimals(paper[group.label][kind]) if kind in paper.get(group.label, ()) else
                       tables.NOTHING for kind in told)))
    notes = ("Mean ± sample standard deviation over training seeds. " + runs.attack_settings(entries)
             + f" Evaluated in {runs.circumstances(entries)}.",
             *runs.warnings(entries), *filter(None, [_ties(groups, names)]),
             *runs.tracks((group.method, group.run) for group in groups))
    return Table(runs.attack_title(entries[0]), (*_COLUMNS[:-1], *([runs.ADAPTIVE] if shown else []), _COLUMNS[-1],
                                               *(f"{kind} %, paper" for kind in told)), rows, notes)


def _config_names(groups: list[Group]) -> list[str]:
    """The config files with their arguments, and for rows of one file the fields in which they differ."""
    def file(group):
        return ":".join(filter(None, (Path(group.config["file"]).stem, group.config["argument"])))

    names = []
    for group in groups:
        others = [g.config for g in groups if file(g) == file(group)]
        names.append(" ".join((file(group), *(differing(group.config, others) if not group.label else ()))))
    return names


def differing(config: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> list[str]:
    """"name=value" of the fields of a config that another has not, or with another value."""
    others = list(others)
    return [f"{name}={value}" for name, value in config.items() if any(of.get(name) != value for of in others)]


def _ties(groups: list[Group], names: list[str]) -> str:
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
