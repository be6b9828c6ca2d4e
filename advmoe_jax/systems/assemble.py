"""From a config to everything that a run needs: data, network and system."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.core import find
from advmoe_jax.core import mesh as meshes
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Split
from advmoe_jax.models import network
from advmoe_jax.train.system import System


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config made real.

    Attributes:
        config: the whole config.
        mesh: of all devices.
        system: what is trained.
        train: the training images.
        test: the test images.
        select: a split and the rows of it that choose the best checkpoint.
    """

    config: ConfigDict
    mesh: jax.sharding.Mesh
    system: System
    train: Split
    test: Split
    select: tuple[Split, np.ndarray]


def assemble(config: ConfigDict) -> Experiment:
    """Loads the data and builds the system that `config.system.name` names.

    Raises:
        UserError: a field names nothing, is out of range, or its data is missing.
    """
    module = find.module("systems", config.system.name, defines="make", kind="system.name")
    mesh = meshes.make()
    meshes.check_batch_size(mesh, config.data.batch_size, "data.batch_size")
    data = pipeline.load(config.data, config.train.select_on, config.train.num_examples)
    net = network.make(config.model, data.image_shape, data.num_classes, mesh)
    system = module.make(config, net, data.rows, mesh)
    return Experiment(config, mesh, system, data.train, data.test, (data.select, data.select_rows))
