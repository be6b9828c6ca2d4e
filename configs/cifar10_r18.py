"""ResNet-18 on CIFAR-10, linf eps 8/255: AdvMoE with a router in every layer, N=2, r=0.5.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/cifar10_r18.py
          python -m advmoe_jax.main --config configs/cifar10_r18.py:at_dense  (at_sdense, at_moe, natural)
Hardware: one accelerator; on CPU see configs/cifar10_short.py.
Time:     not measured yet.
Expected: not run yet. The paper reports, for 100 epochs, SA 80.15 and RA(PGD-50) 51.83 for AdvMoE, 82.99 and 50.13
          for AT(Dense), 80.18 and 48.12 for AT(S-Dense), 78.84 and 45.57 for AT(MoE).
"""

from advmoe_jax.core import config as configs
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default()
    methods.choose(config, method)
    return config
