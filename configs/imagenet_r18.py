"""ResNet-18 on ImageNet, 224 pixels, linf eps 2/255: AdvMoE with a router in every layer, N=2, r=0.5.

Images are in [0, 1], in training as in attacks, with normalisation inside the model.

Command:  python -m advmoe_jax.data.prepare imagenet --raw FOLDER --out data
          (FOLDER holds the official tar archives, or the folders train and val)
          python -m advmoe_jax.main --config configs/imagenet_r18.py
          python -m advmoe_jax.main --config configs/imagenet_r18.py:at_dense  (at_sdense, at_moe, natural)
Hardware: accelerators, and a CPU core for every 400 images/s of training; --config.data.workers says how many.
Time:     not measured yet.
Expected: not run yet. The paper reports an RA(PGD-50) of 44.64 for AT(Dense) and 43.32 for AdvMoE.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.models import normalisation
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default(data="imagenet")
    methods.choose(config, method)
    config.data.batch_size = 512
    config.data.workers = 16
    config.model.stem = "imagenet"
    config.model.mean, config.model.std = normalisation.IMAGENET
    config.attack.eps = "2/255"
    return config
