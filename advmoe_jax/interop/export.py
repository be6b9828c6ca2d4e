"""A trained model as files that others read: `python -m advmoe_jax.main --mode export --workdir W`.

A format is a module of `interop.exports`: `write(of, folder) -> how to use it, for the card`. The folder is there whole
or not at all, with a model card and the config. It is that of a finished run too, where the format keeps the weights
as this package names them: it is evaluated, exported and started from as any other.
"""

import dataclasses

from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import console, files, find, status
from advmoe_jax.core.fields import setting
from advmoe_jax.data import pipeline
from advmoe_jax.interop import card, finished
from advmoe_jax.models import model as models
from advmoe_jax.models.model import Model
from advmoe_jax.train import checkpoint as checkpoints
from advmoe_jax.train import weights
from advmoe_jax.train.state import Trained

INPUTS = ("float", "uint8")
_FORMATS = ("interop.exports", "write")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.export`. None of them makes another experiment."""

    format: str = setting("stablehlo", "what a trained model is exported as", room=_FORMATS)
    out: str = setting("", "a folder that is new or empty; empty: export/FORMAT in the workdir")
    licence: str = setting("mit", "of the weights, as the Hugging Face Hub abbreviates it")


@dataclasses.dataclass(frozen=True)
class Export:
    """What is exported.

    Attributes:
        config: of the run.
        workdir: of the run.
        model: that it trained.
        trained: its variables and masks, as numpy.
        checkpoint: "best", "last", "ema" or a step.
        step: of the checkpoint.
    """

    config: ConfigDict
    workdir: epath.Path
    model: Model
    trained: Trained
    checkpoint: str
    step: int


def export_run(config: ConfigDict, workdir: epath.Path, which: str = "") -> epath.Path:
    """Exports a checkpoint of a run as `config.export` says.

    Args:
        config: of the run.
        workdir: of the run, or of an export of it with its weights.
        which: the checkpoint, "best" unless given; of an export the one that it is of.
    Returns:
        The folder.
    Raises:
        UserError: no such checkpoint, a folder that holds something, a package that is missing, or a model that the
            format cannot hold; nothing is written.
    """
    own = config.export
    where = finished.free(own.out or str(workdir / "export" / own.format), "export.out")
    form = find.module(_FORMATS[0], own.format, defines=_FORMATS[1], kind="export.format")
    origin = weights.origin(workdir) if weights.is_in(workdir) else None
    model = models.make(config.model, *(origin.of_images if origin else pipeline.of_images(config.data)))
    which = which or (origin.checkpoint if origin else "best")
    with checkpoints.opened(workdir, create=False) as saved:
        of = Export(config, workdir, model, saved.restore_trained(which, model.shapes), which, saved.step(which))
    with finished.appearing(where) as folder:
        use = form.write(of, folder)
        configs.write(_of_run(config), folder / "config.json")
        files.write_text(folder / "README.md", card.text(of, use))
    console.say(f"{where}: the {which} checkpoint of {workdir}, of step {of.step}, as {own.format}; its README.md says "
                "how it is used")
    return where


def write_run(of: Export, folder: epath.Path) -> None:
    """Writes the weights, which make the folder that of a finished run, beside a config.json."""
    own = {name: value for name, value in of.config.export.items() if name != "out"}
    origin = weights.Origin(str(of.workdir), of.checkpoint, of.step, tuple(of.model.image_shape), of.model.num_classes,
                            own)
    weights.write(folder, of.trained, origin, {"config": configs.to_json(_of_run(of.config))})
    status.write(folder, "trained")


def _of_run(config: ConfigDict) -> ConfigDict:
    """The config without what it says of this export, so that another may follow."""
    return configs.complete(ConfigDict({name: of for name, of in config.to_dict().items() if name != "export"}))
