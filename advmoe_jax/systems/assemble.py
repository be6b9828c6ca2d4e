"""From a config to everything that a run needs: data, model and system."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.attacks import parse
from advmoe_jax.core import find, units
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.data import extra, pipeline
from advmoe_jax.evaluation import criteria, measure
from advmoe_jax.evaluation.suites import Suite
from advmoe_jax.models import model as models
from advmoe_jax.models import needs
from advmoe_jax.systems import sources
from advmoe_jax.train import state as states
from advmoe_jax.train.loop import Rates
from advmoe_jax.train.state import State
from advmoe_jax.train.system import System


@dataclasses.dataclass(frozen=True)
class Config:
    """The field of `config.system` that names the others."""

    name: str = setting("advmoe", "a module of advmoe_jax.systems", room=("systems", "make"))


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config made real.

    Attributes:
        config: the whole config.
        mesh: of all devices.
        system: what is trained.
        data: images.
        select: measures a state on the images that choose the best checkpoint.
        criteria: measures what `train.criteria` names on the same images, {"images": m, "accuracy/NAME": share}; None
            where it names nothing.
    """

    config: ConfigDict
    mesh: jax.sharding.Mesh
    system: System
    data: pipeline.Data
    select: Callable[[State], Rates]
    criteria: Callable[[State], Mapping[str, float]] | None = None


def check(config: ConfigDict) -> None:
    """Raises UserError for attacks that cannot choose a checkpoint, or be measured beside, and for images that are too
    small for the model."""
    _selection(config)
    criteria.asked(config)
    shape, _ = pipeline.known(config.data)
    if shape:
        needs.check_pixels(config.model, shape)


def assemble(config: ConfigDict, starts: bool = True, workdir: epath.Path | None = None) -> Experiment:
    """Loads the data and the runs that it starts from, and builds the system that `config.system.name` names.

    Args:
        config: checked.
        starts: whether it is to be trained; for what is evaluated alone, the runs that it started from may be gone, and
            extra images too.
        workdir: of the run. A system that chooses something before it trains names the file of it in KEEPS, and gets
            what an earlier start left there as `kept`.
    Raises:
        UserError: a field names nothing, is out of range, or its data is missing.
    """
    mesh = meshes.make()
    parts = config.train.accumulate
    meshes.check_batch_size(mesh, config.data.batch_size // parts,
                            "data.batch_size / train.accumulate" if parts > 1 else "data.batch_size")
    data = pipeline.load(config.data, config.train.select_on, config.train.select_examples, config.seed)
    if starts:
        data = dataclasses.replace(data, train=extra.mixed(config.data, data.train, data.num_classes))
    runs = sources.load(config, data.image_shape, data.num_classes) if starts else {}
    model = models.make(config.model, data.image_shape, data.num_classes, mesh)
    module = find.module("systems", config.system.name, defines="make", kind="system.name")
    _check_outputs(model)
    kept = {"kept": _kept(workdir / module.KEEPS)} if starts and workdir and hasattr(module, "KEEPS") else {}
    system = module.make(config, model, data, mesh, runs, **kept)
    _check_system(config.system.name, system)
    system = dataclasses.replace(system, describe=extra.marked(system.describe, extra.about(config.data)))
    suite, more = _selection(config), criteria.asked(config)
    for asked in filter(None, (suite, more)):
        measure.check(asked, model)

    def attacked(state: State, suite: Suite):
        return measure.run(model, states.masked(state).variables, data.select, data.select_rows, suite, mesh=mesh,
                           batch_size=config.eval.batch_size, seed=config.seed)

    def select(state: State) -> Rates:
        found = attacked(state, suite)
        return float(found.survivors().mean()), float(found.correct.mean())

    def of_criteria(state: State) -> dict[str, float]:
        rates = criteria.accuracies(attacked(state, more))
        return {"images": len(data.select_rows)} | {f"accuracy/{name}": rate for name, rate in rates.items()}

    return Experiment(config, mesh, system, data, select, of_criteria if more else None)


def _kept(path: epath.Path) -> Any:
    """The JSON of a file; None where there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _check_outputs(model: models.Model) -> None:
    logits, _ = models.output_shapes(model)
    if logits.shape != (1, model.num_classes):
        raise UserError(f"the {model.kind} model gives logits of shape {logits.shape} for one image: expected "
                        f"{(1, model.num_classes)}, one for each class of the data")


def _check_system(name: str, system: System) -> None:
    if not isinstance(system, System):
        raise UserError(f"make() of advmoe_jax/systems/{name}.py returns {type(system).__name__}: expected a System")
    for length in system.every:
        units.length(length, f"a key of System.every of {name}")


def _selection(config: ConfigDict) -> Suite:
    specs = parse.attacks(config.train.select_attack, norm=config.attack.norm, eps=config.attack.eps)
    return Suite("selection", specs, survivors_only=True)
