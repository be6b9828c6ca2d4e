"""How differently the runs of a pool share out their weights: what each of them keeps of each layer.

Figure 5 of EED (Jung & Song, CVPR 2025, appendix B.6), by the pruning.json of the runs that a team.json names.
L layers, N runs.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core import tables
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.tables import Table
from advmoe_jax.report.runs import Run

_ALL = "all"
_NOTE = "Percent of the weights of a layer; layers in the order of the network. {who} chosen from this pool."


@dataclasses.dataclass(frozen=True)
class Kept:
    """What the runs of a pool keep.

    Attributes:
        table: as reports show it.
        layers: L names, and "all".
        runs: N names.
        shares: (L + 1, N) in percent.
    """

    table: Table
    layers: tuple[str, ...]
    runs: tuple[str, ...]
    shares: np.ndarray


def of(root: epath.Path, found: Mapping[str, Run]) -> list[Kept]:
    """What each pool keeps from which a run has chosen its team, equal pools once.

    Args:
        root: folder of a recipe, with the runs of its pools.
        found: its runs by name.
    Returns:
        Pools of which every run says what it keeps, of equal layers.
    Raises:
        UserError: a file is damaged.
    """
    pools: dict[tuple[str, ...], list[str]] = {}
    for name, run in found.items():
        if (team := _read(run.folder / "team.json", "system.name=eed")) is not None:
            pools.setdefault(tuple(member["run"] for member in team["pool"]), []).append(name)
    return [kept for pool, teams in pools.items() if (kept := _kept(root, pool, teams))]


def _kept(root: epath.Path, pool: Sequence[str], teams: Sequence[str]) -> Kept | None:
    read = [_read(root / name / "pruning.json", "system.name=prune") or {} for name in pool]
    weights = [of_run.get("weights") for of_run in read]  # which runs of older versions do not have
    if not all(weights) or any(of_run.keys() != weights[0].keys() for of_run in weights):
        return None
    counts = np.array([list(of_run.values()) for of_run in weights], float)  # (N, L, 2), kept and all
    counts = np.concatenate([counts, counts.sum(1, keepdims=True)], 1)
    layers, shares = (*weights[0], _ALL), 100 * (counts[..., 0] / counts[..., 1]).T
    rows = [(layer, f"{int(size):,}", *map(tables.decimals, of_layer))
            for layer, size, of_layer in zip(layers, counts[0, :, 1], shares)]
    who = f"{', '.join(teams)} {'is' if len(teams) == 1 else 'are'}"
    table = Table(f"Kept weights of each layer, pool of {teams[0]}", ("layer", "weights", *pool), rows,
                  (_NOTE.format(who=who),))
    return Kept(table, layers, tuple(pool), shares)


def _read(path: epath.Path, system: str) -> dict[str, Any] | None:
    """What a run left there; None if it did not."""
    try:
        found = json.loads(path.read_text())
        return {**found, "pool": [{"run": str(of["run"])} for of in found.get("pool", ())]}
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: expected what a run of {system} writes; move it away to report without it"
                        ) from None
