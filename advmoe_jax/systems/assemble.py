"""From a config to everything that a run needs: data, network and system."""

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict

from advmoe_jax.core import find
from advmoe_jax.core import mesh as meshes
from advmoe_jax.data import pipeline
from advmoe_jax.models import network
from advmoe_jax.train.system import System


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config made real.

    Attributes:
        config: the whole config.
        mesh: of all devices.
        system: what is trained.
        train: {"image": (n, H, W, C) uint8, "label": (n,)} training images.
        test: the same of the test images.
        select: arrays and indices that choose the best checkpoint.
    """

    config: ConfigDict
    mesh: jax.sharding.Mesh
    system: System
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    select: tuple[dict[str, np.ndarray], np.ndarray]


def assemble(config: ConfigDict) -> Experiment:
    """Loads the data and builds the system that `config.system.name` names.

    Raises:
        UserError: a field names nothing, is out of range, or its data is missing.
    """
    module = find.module("systems", config.system.name, defines="make", kind="system.name")
    mesh = meshes.make()
    meshes.check_batch_size(mesh, config.data.batch_size, "data.batch_size")
    dataset = pipeline.open_dataset(config.data.name, config.data.dir, config.data.subset)
    train = {"image": dataset.train_images, "label": dataset.train_labels}
    test = {"image": dataset.test_images, "label": dataset.test_labels}
    count = config.train.num_examples
    if config.train.select_on == "test":
        indices, select = np.arange(len(train["label"])), (test, np.arange(len(test["label"]))[:count])
    else:
        indices, held_out = pipeline.holdout(len(train["label"]), train["label"])
        select = train, held_out[:count]
    net = network.make(config.model, dataset.image_shape, dataset.num_classes, mesh)
    return Experiment(config, mesh, module.make(config, net, indices, mesh), train, test, select)
