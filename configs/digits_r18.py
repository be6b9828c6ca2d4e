"""Narrow ResNet-18 on scikit-learn's digits (1,797 images of 8x8), linf eps 0.1.

Command:  python -m advmoe_jax.main --config configs/digits_r18.py
          python -m advmoe_jax.main --config configs/digits_r18.py:at_dense  (at_sdense, at_moe, natural)
Hardware: 2 CPU cores.
Time:     4 minutes for advmoe with its evaluation, on cores that were shared; the others 1 to 3.
Expected: RA(PGD-50) on 500 test images, mean of seeds 0 to 2: advmoe SA 96.2 RA 81.0; at_moe 95.7, 78.7; at_sdense
          97.5, 87.7; at_dense 98.4, 90.4; natural 92.7, 38.1. Seeds differ by up to 6 points.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default(data="digits")
    methods.choose(config, method)
    config.data.batch_size = 64
    config.data.pad = 1
    config.data.flip = False
    config.model.width = 16
    config.attack.eps = "0.1"
    config.train.length = "60 epochs"
    config.train.eval_every = "5 epochs"
    config.train.save_every = "5 epochs"
    config.eval.batch_size = 130  # the validation images in one batch, and no second shape to compile
    return config
