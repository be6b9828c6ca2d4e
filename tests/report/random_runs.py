"""Finished runs of random weights on digits. They need the fixture tiny_resnet."""

import jax

from advmoe_jax.core import config as configs
from advmoe_jax.interop import finished
from advmoe_jax.models import model as models
from advmoe_jax.ops import masks as masking

DENSE = {"model.num_experts": 1, "model.model_scale": 1.0}


def random_run(folder, seed=0, masks=None, **fields):
    """Makes a run, whose model and variables are given back.

    Args:
        folder: its workdir.
        seed: of the weights.
        masks: {path of a kernel: mask}.
        fields: of its config, with __ for dots.
    """
    config = configs.default(data="digits")
    given = {name.replace("__", "."): value for name, value in fields.items()}
    for name, value in {"model.depth": 4, "model.width": 4, "attack.eps": "0.1", **given}.items():
        configs.override(config, f"{name}={value}")
    config = configs.complete(config)
    config.name = folder.name
    model = models.make(config.model, (8, 8, 1), 10)
    variables = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))
    trees = masking.of_leaves(variables["params"], masks) if masks else {}
    finished.write(folder, config, variables, {}, {group: tree for group, tree in trees.items() if jax.tree.leaves(tree)
                                                   })
    return model, variables
