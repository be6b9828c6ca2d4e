"""Finished runs that another run starts from, `config.init_from`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import paths, rng, status, tree
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.models import model as models
from advmoe_jax.models.model import Model
from advmoe_jax.train import checkpoint


@dataclasses.dataclass(frozen=True)
class Source:
    """A finished run.

    Attributes:
        workdir: where it is.
        config: its own.
        model: that it trained.
        variables: of one checkpoint, as numpy.
        masks: of the same, {group: tree}; {} if it is dense.
        step: of the checkpoint.
    """

    workdir: epath.Path
    config: ConfigDict
    model: Model
    variables: dict[str, Any]
    masks: dict[str, Any]
    step: int


def names(config: ConfigDict) -> dict[str, tuple[epath.Path, str]]:
    """{name: (workdir, one of checkpoint.NAMES)} of `config.init_from`, in order."""
    found = {}
    for text in paths.listed(config.init_from):
        name, which = paths.source(text)
        if name in found:
            raise UserError(f"init_from names {name} twice: expected each run once")
        found[name] = paths.path(name), one_of("checkpoint in init_from", which or "best", checkpoint.NAMES)
    return found


def needed(config: ConfigDict) -> None:
    """Raises UserError for a system that starts from a finished run, without one."""
    if not config.init_from:
        raise UserError(f"system.name={config.system.name} needs init_from: expected a finished run, or a model made "
                        "by python -m advmoe_jax.interop.torch_import")


def load(config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int) -> dict[str, Source]:
    """The runs of `config.init_from` by name, in order.

    Args:
        config: of the run that starts from them.
        image_shape, num_classes: of its data, which theirs must share.
    Raises:
        UserError: one is not there, not finished, or cannot be read.
    """
    found, sources = names(config), {}
    of_runs = {name: status.config_of_trained(workdir, f"init_from names {name}")
               for name, (workdir, _) in found.items()}  # all, before one is read
    for name, (workdir, which) in found.items():
        own = of_runs[name]
        model = models.make(own.model, image_shape, num_classes)
        with checkpoint.opened(workdir, create=False) as saved:
            step = saved.step(which)
            variables, masks = saved.restore_trained(which, model.shapes)
        sources[name] = Source(workdir, own, model, variables, masks, step)
    return sources


def initial(model: Model, sources: Mapping[str, Source], seed: int = 0
            ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Variables and masks that a model takes from finished runs; (None, {}) if there are none.

    Args:
        model: what starts from them.
        sources: finished runs, by name.
        seed: of the run, for groups that start afresh.
    Raises:
        UserError: they are not of this model's architecture.
    """
    if not sources:
        return None, {}
    runs = list(sources.values())
    variables = {part: model.gather([run.variables[part] for run in runs]) for part in runs[0].variables}
    if afresh := [group for group, found in variables["params"].items() if found is None]:
        begin = jax.jit(lambda key: {part: {group: trees[group] for group in afresh}
                                     for part, trees in model.init(key).items()})
        fresh = jax.device_get(begin(rng.stream(rng.key(seed, "init"), "params")))
        variables = {part: trees | fresh[part] for part, trees in variables.items()}
    if different := tree.first_difference(model.shapes, variables):
        name, ours, theirs = different
        raise UserError(f"init_from names {', '.join(sources)}, of another architecture: {name} is {theirs} there, "
                        f"the config's model has {ours}")
    masks = model.gather([run.masks for run in runs]) if any(run.masks for run in runs) else {}
    return variables, {group: part for group, part in masks.items() if part}
