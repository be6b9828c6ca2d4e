"""AdvMoE on CIFAR-10 as its paper describes it, where the paper says anything.

Zhang et al., ICCV 2023, section 5: 100 epochs, batch 128, SGD with learning rate 0.1 for router and backbone alike,
cosine schedule, PGD-2 at 8/255. Differences to configs/cifar10_r18.py: the router's learning rate without warm-up and
clipping, independent experts, and training attacks through the router by the released code's gradient.

Command:  python -m advmoe_jax.main --config configs/paper/advmoe_cifar10_r18.py
Hardware: one accelerator.
Time:     not measured yet.
Expected: not run yet; users of the released code report that a router learning rate of 0.1 collapses the routing. The
          paper reports SA 80.15, RA(PGD-50) 51.83, RA(AutoAttack) 45.13.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default()
    methods.choose(config, method)
    if config.model.num_experts > 1:
        config.model.expert_init = "independent"
        config.attack.router_grad = "ste_selected"
        config.optim.router.learning_rate = 0.1
        config.optim.router.warmup = "0%"
        config.optim.router.clip_norm = 0.0
    return config
