"""Finished runs of random weights on digits. They need the fixture tiny_resnet."""

import jax
import numpy as np

from advmoe_jax.core import config as configs
from advmoe_jax.core import tree
from advmoe_jax.interop import finished
from advmoe_jax.models import model as models
from advmoe_jax.ops import masks as masking

DENSE = {"model.num_experts": 1, "model.model_scale": 1.0}


def random_run(folder, seed=0, masks=None, **fields):
    """Makes a run, whose model and variables, numpy arrays, are given back; nothing is compiled.

    Args:
        folder: its workdir.
        seed: of the weights.
        masks: {path of a kernel: mask}.
        fields: of its config.
    """
    config = configs.default(data="digits")
    for name, value in {"model.depth": 4, "model.width": 4, "attack.eps": "0.1", **fields}.items():
        configs.override(config, f"{name}={value}")
    config = configs.complete(config)
    config.name = folder.name
    model, numbers = models.make(config.model, (8, 8, 1), 10), np.random.default_rng(seed)

    def leaf(path, of):
        """Kaiming's kernels and norms that do nothing."""
        name = tree.path_name(path).split("/")[-1]
        if name == "kernel":
            return numbers.normal(0, np.sqrt(2 / np.prod(of.shape[:-1])), of.shape).astype(np.float32)
        return np.full(of.shape, name in ("scale", "var"), np.float32)

    variables = jax.tree_util.tree_map_with_path(leaf, model.shapes)
    trees = masking.of_leaves(variables["params"], masks) if masks else {}
    masked = {group: tree for group, tree in trees.items() if jax.tree.leaves(tree)}
    finished.write(folder, config, variables, {}, masked)
    return model, variables
