"""EED on the first 10,000 CIFAR-10 training images, ResNet-18 of width 16: the recipe of configs/eed_digits.py.

Short training, as in configs/cifar10_short.py, by TRADES, linf eps 8/255. It says nothing about full training.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/eed_cifar10.py
          python -m advmoe_jax.main --config configs/eed_cifar10.py:hosts=dverge
Hardware: 2 CPU cores.
Time:     not measured yet; 37 epochs of the dense network's cost in the pool, half of them on half of the images, and
          as many in teams and baselines.
Expected: not run yet. At full training the paper's ResNet-18 has SA 86.1 and RA 48.1 by AutoAttack at 20 % of the
          weights, and HARP's 83.8 and 45.4.
"""

import cifar10_short
import eed_digits

EPOCHS = {"search": 1, "left": 3, "team": 2, "harp_search": 2, "harp_left": 6}


def get_recipe(argument=""):
    return eed_digits.recipe(cifar10_short.get_config, EPOCHS, "EED, short training on CIFAR-10, linf 8/255", argument)
