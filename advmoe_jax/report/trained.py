"""Finished runs with their weights, for reports that ask the networks again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from advmoe_jax.core import paths, status, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.data.source import Dataset
from advmoe_jax.models import model as models
from advmoe_jax.models.model import Model
from advmoe_jax.train import checkpoint as checkpoints

CHECKPOINTS = ("best", "last")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run: its checkpoint of a step, and the model whose variables these are.

    Attributes:
        workdir: as it was named.
        name: of its folder.
        config: its own.
        dataset: its images.
        model: that it trained.
        variables: of the checkpoint, as numpy.
        masks: of the same, {group: tree}; {} if it is dense.
        step: of the checkpoint.
    """

    workdir: str
    name: str
    config: ConfigDict
    dataset: Dataset
    model: Model
    variables: dict[str, Any]
    masks: dict[str, Any]
    step: int


def load(workdir: str, which: str, said: str, first: Trained | None = None) -> Trained:
    """Reads a run.

    Args:
        workdir: of the run.
        which: the checkpoint, one of CHECKPOINTS.
        said: how an error names it, "--workdir names runs/a".
        first: a run on whose data it must be.
    Raises:
        UserError: it is not there, has not finished training, cannot be read, or is on other data.
    """
    folder = paths.path(workdir)
    config = status.config_of_trained(folder, said)
    if first and config.data.name != first.config.data.name:
        raise UserError(f"{said}, a run on {config.data.name}: expected {first.config.data.name}, as the first is")
    dataset = pipeline.open_dataset(config.data.name, config.data.dir, view=config.data)
    model = models.make(config.model, dataset.image_shape, dataset.num_classes)
    with checkpoints.opened(folder, create=False) as saved:
        found = saved.restore_trained(which, model.shapes)
        return Trained(workdir, folder.name, config, dataset, model, found.variables, found.masks, saved.step(which))


def alike(workdirs: Sequence[str], which: str) -> dict[str, Trained]:
    """Runs of one architecture and on the same data, by the names of their folders.

    Args:
        workdirs: as --workdir names them.
        which: the checkpoint, one of CHECKPOINTS.
    Raises:
        UserError: as `load`; or one is of another architecture than the first, or of a name that is there already.
    """
    found: dict[str, Trained] = {}
    for workdir in workdirs:
        said, first = f"--workdir names {workdir}", next(iter(found.values()), None)
        run = load(workdir, which, said, first)
        if first and (different := tree.first_difference(first.model.shapes, run.model.shapes)):
            path, ours, theirs = different
            raise UserError(f"{said}, of another architecture: {path} is {theirs} there, {ours} in the first run")
        if run.name in found:
            raise UserError(f"{said}, and another run of that name: expected folders of different names, which tell "
                            "runs apart")
        found[run.name] = run
    return found
