"""HYDRA beside what is trivial at the same sparsity: narrow ResNet-18, 90 % of all weights gone, CIFAR-10.

Sehwag et al., NeurIPS 2020: an adversarially trained network, a search for the weights to keep, and training of what is
left. Beside it the smallest weights go (R-LWM), or random ones, and the rest trains as long as HYDRA's both phases
together. Of every convolution and the linear layer the same share goes. As in configs/cifar10_short.py the network has
width 16 and sees the first 10,000 training images; linf eps 8/255.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/hydra_cifar10.py
          python -m advmoe_jax.main --config configs/hydra_cifar10.py:digits
Hardware: 2 CPU cores.
Time:     not measured yet; 20 epochs and five evaluations of 500 images, meant to take 40 minutes. Digits: less.
Expected: not run yet. At 90 % and full training HYDRA's ResNet-18 has SA 76.7 and RA 43.3 by AutoAttack in the
          benchmark of adversarial pruning (Piras et al.).
"""

import cifar10_short
import digits_r18

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import unknown_name
from advmoe_jax.core.recipe import Recipe

RATE = "9/10"
DATA = {"cifar10": (cifar10_short, 1), "digits": (digits_r18, 8)}  # and how many epochs stand for one


def run(data, epochs, system="standard", init_from="", **fields):
    """A run of the recipe: a system on a narrow dense ResNet-18, by TRADES; fields are those of the system."""
    if data not in DATA:
        raise unknown_name("data in the recipe's argument", data, DATA)
    module, factor = DATA[data]
    config = module.get_config("at_dense")
    configs.choose(config, system=system)
    for name, value in ({"loss": "trades"} | fields).items():
        configs.override(config, f"system.{name}={value}")
    config.init_from = init_from
    config.train.length = f"{epochs * factor} epochs"
    config.eval.n = 500
    return config


def left(data, epochs, init_from, method):
    """A run that prunes another and trains what is left."""
    rate = {} if method == "given" else {"rate": RATE}  # a search has said how much goes
    config = run(data, epochs, "prune", init_from, method=method, kernels="every", **rate)
    config.optim.backbone.learning_rate = 0.05
    return config


def get_recipe(data="cifar10"):
    runs = {"base": run(data, 5),
            "search": run(data, 2, "mask_search", "base", rate=RATE),
            "hydra": left(data, 3, "search@last", "given"),
            "magnitude": left(data, 5, "base", "magnitude"),
            "random": left(data, 5, "base", "random_weights")}
    rows = {"AT(Dense)": ("base",), "HYDRA": ("hydra",), "HYDRA, before the rest is trained": ("search",),
            "smallest weights gone (R-LWM)": ("magnitude",), "random weights gone": ("random",)}
    return Recipe(runs, f"HYDRA at {RATE} of the weights gone, {data}", rows)
