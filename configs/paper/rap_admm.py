"""RAP-ADMM as SR-GKP's tables 9 to 11 have it: filters pruned by ADMM while the network is trained adversarially.

Ye et al., ICCV 2019, in the setting of Zhong et al., NeurIPS 2023: a naturally trained CIFAR ResNet is drawn to a copy
of itself without 7/16 of its filters, on PGD-10 images at 8/255, for half of 300 epochs; then those filters go, and the
rest is trained in the same way. Beside it, at once and for 300 epochs, filters of small norm or random ones go. The
argument is the depth. Everything else is that of configs/paper/srgkp_tables.py.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/paper/rap_admm.py  (:32, :110)
Hardware: one accelerator; 300 epochs of natural and three times 300 of adversarial training.
Time:     not measured yet.
Expected: not run yet. The paper reports for ResNet-56: benign 78.37, FGSM 75.19 and 27.84, PGD 61.15.
"""

import srgkp_tables

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import unknown_name
from advmoe_jax.core.recipe import Line, Printed, Recipe

TABLES = {"32": 9, "56": 10, "110": 11}


def at_once(net, method):
    """Filters go by one score, and the rest is trained adversarially."""
    config = srgkp_tables.pruned(net, method, 7)
    configs.override_all(config, ["system.unit=filter", "system.loss=madry"])
    config.train.attack, config.attack.eps = srgkp_tables.ROBUST["attack"], srgkp_tables.ROBUST["eps"]
    return config


def get_recipe(depth="56"):
    if depth not in TABLES:
        raise unknown_name("depth in the recipe's argument", depth, TABLES)
    net = f"r{depth}"
    runs = {net: srgkp_tables.natural(net), **srgkp_tables.rap_admm(net, 7),
            "magnitude": at_once(net, "magnitude"), "random": at_once(net, "random_weights")}
    of = srgkp_tables.tables()[TABLES[depth]]
    lines = [line for line in of.lines if line.label in ("Unpruned", "RAP-ADMM")]
    lines += [Line("small filters", "last", runs=("magnitude",)), Line("random filters", "last", runs=("random",))]
    rows = {"Unpruned": (net,), "RAP-ADMM": (f"{net}-rap-7",), "RAP-ADMM, before anything goes": (f"{net}-admm-7",),
            "small filters go at once": ("magnitude",), "random filters go at once": ("random",)}
    return Recipe(runs, f"RAP-ADMM, ResNet-{depth} on CIFAR-10", rows, tables=(
        Printed(of.title, of.columns, tuple(lines)),))
