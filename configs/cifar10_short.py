"""Short training on the first 10,000 CIFAR-10 training images: ResNet-18 of width 16, linf eps 8/255.

TODO
"""

from advmoe_jax.core import config as configs

EPOCHS = {"advmoe": 9, "at_moe": 18, "at_sdense": 36, "at_dense": 12, "natural": 12}


def get_config(method="advmoe"):
    config = configs.default()
    configs.set_method(config, method)
    config.data.subset = 10_000
    config.model.width = 16
    config.train.length = f"{EPOCHS[method]} epochs"
    config.train.num_examples = 500
    config.eval.n = 2000
    return config
