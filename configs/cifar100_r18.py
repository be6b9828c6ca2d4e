"""ResNet-18 on CIFAR-100, linf eps 8/255: AdvMoE with a router in every layer, N=2, r=0.5.

Command:  python -m advmoe_jax.data.prepare cifar100 --out data
          python -m advmoe_jax.main --config configs/cifar100_r18.py
          python -m advmoe_jax.main --config configs/cifar100_r18.py:at_dense  (at_sdense, at_moe, natural)
Hardware: one accelerator.
Time:     not measured yet.
Expected: not run yet.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default(data="cifar100")
    methods.choose(config, method)
    return config
