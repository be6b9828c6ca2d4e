"""ResNet-18 on Tiny-ImageNet, 64 pixels, linf eps 2/255: AdvMoE with a router in every layer, N=2, r=0.5.

Images are in [0, 1], with normalisation inside the model.

Command:  python -m advmoe_jax.data.prepare tiny_imagenet --raw tiny-imagenet-200.zip --out data
          python -m advmoe_jax.main --config configs/tiny_imagenet_r18.py
          python -m advmoe_jax.main --config configs/tiny_imagenet_r18.py:at_dense  (at_sdense, at_moe, natural)
Hardware: one accelerator.
Time:     not measured yet.
Expected: not run yet.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.models import normalisation
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default(data="tiny_imagenet")
    methods.choose(config, method)
    config.model.mean, config.model.std = normalisation.IMAGENET
    config.attack.eps = "2/255"
    return config
