"""WORKDIR/status.json: how far a run has come."""

import dataclasses
import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError

STATES = ("new", "training", "trained", "finished", "failed")
"""Not begun; begun; trained to the end; evaluated too; refused or not finite, see `why`."""


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a run has come.

    Attributes:
        state: one of STATES.
        seconds: of training and evaluation, over all starts.
        why: what failed; empty otherwise.
    """

    state: str = "new"
    seconds: float = 0.0
    why: str = ""

    @property
    def is_trained(self) -> bool:
        return self.state in ("trained", "finished")


def read(workdir: epath.PathLike) -> Status:
    """The status of a workdir; "new" where there is none, or none that can be read."""
    try:
        return Status(**json.loads((epath.Path(workdir) / "status.json").read_text()))
    except (OSError, ValueError, TypeError):
        return Status()


def config_of_trained(workdir: epath.Path, said: str) -> ConfigDict:
    """The config of a run that has been trained to the end.

    Args:
        workdir: of the run.
        said: how an error names it, "init_from names runs/a".
    Raises:
        UserError: there is none, or it has not finished training.
    """
    if not (workdir / "config.json").exists():
        raise UserError(f"{said}: expected the workdir of a run, which has a config.json")
    config = configs.read(workdir / "config.json")
    if not read(workdir).is_trained:
        raise UserError(f"{said}, which has not finished training ({config.name}): expected a finished run; the "
                        "command that it was started with continues it")
    return config


def write(workdir: epath.PathLike, state: str, seconds: float = 0.0, why: str = "") -> None:
    """Writes the status; `seconds` are added to those that are there."""
    before = read(workdir)
    content: dict[str, Any] = dataclasses.asdict(Status(state, round(before.seconds + seconds, 1), why))
    files.write_json(epath.Path(workdir) / "status.json", content)
