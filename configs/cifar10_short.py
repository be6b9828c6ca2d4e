"""Short training on the first 10,000 CIFAR-10 training images: ResNet-18 of width 16, linf eps 8/255.

The epochs are what about 20 minutes a model allow on 2 CPU cores. No result of these says anything about full training.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/cifar10_short.py  (:at_moe, :at_sdense, :at_dense)
Hardware: 2 CPU cores.
Time:     about 20 minutes and the evaluation, 5 to 10 minutes, when nothing else runs (images/s: advmoe 92, at_moe 140,
          at_sdense 225, at_dense 95).
Expected: one seed, best checkpoint, RA(PGD-50) on 2,000 test images: at_sdense SA 52.3 RA 29.2; at_dense 43.5, 25.9;
          at_moe 42.2, 24.2; advmoe 38.7, 22.5.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.systems import methods

EPOCHS = {"advmoe": 11, "at_moe": 17, "at_sdense": 28, "at_dense": 12, "natural": 12}


def get_config(method="advmoe"):
    config = configs.default()
    methods.choose(config, method)
    config.data.subset = 10_000
    config.model.width = 16
    config.train.length = f"{EPOCHS[method]} epochs"
    config.train.eval_every = "20%"
    config.train.select_examples = 500
    config.eval.n = 2000
    return config
