"""Fifteen ways to prune one ResNet-20 at the same cost, and what each leaves of its accuracy, clean and attacked.

The network is akamaster's, trained naturally on CIFAR-10 (91.73 %). Each method removes 7/16 of the
multiply-accumulates of the convolutions in blocks; a run of 0 steps shows what is left at once, another one what
training on the first 20,000 images gives back. Few epochs, one seed: methods that are close are not told apart.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.interop.torch_import --arch resnet20 --weights resnet20.th --out runs/resnet20
          python -m advmoe_jax.main --config configs/pruning_cifar10.py
          python -m advmoe_jax.main --mode evaluate --config configs/pruning_cifar10.py --checkpoint best
          --config.eval.suite=standard --config.eval.eps="0.5/255,1/255" --config.eval.n=256 (AutoAttack)
Hardware: 2 CPU cores.
Time:     two hours of one core, or half as long with a second such command beside; training a method takes four
          minutes of a core, its evaluations three.
Expected: SA 91.0 unpruned; trained on FPGM 88.4, DepGraph 87.6, L1Norm-B 87.2, LRF 86.6, SR-GKP 86.4, random filters
          83.2, random kernels 69.6; SR-GKP shares the fifth place by mean rank. The table is in configs/README.md.
"""

import prune_resnet20

from advmoe_jax.core import config as configs
from advmoe_jax.core.recipe import Recipe

EPOCHS = 1
METHODS = {
    "srgkp": ("SR-GKP", {}),
    "srgkp_fresh": ("SR-GKP, beta of the paper", dict(method="srgkp", beta_mode="fresh")),
    "tmi_greedy": ("TMI-GKP (greedy, k-means)", {}),
    "tmi_random": ("TMI-GKP (greedy, random groups)", dict(method="tmi_greedy", grouping="random")),
    "l1norm_a": ("L1Norm-A", dict(method="l1norm", variant="A")),
    "l1norm_b": ("L1Norm-B", dict(method="l1norm", variant="B")),
    "fpgm": ("FPGM", {}),
    "sfp": ("SFP", {}),
    "hrank_scores": ("HRank (scores)", {}),
    "taylor_channels": ("CC (channels)", {}),
    "lrf_scores": ("LRF (score)", {}),
    "hesso_decay": ("OTO (HESSO)", {}),
    "depgraph": ("DepGraph", {}),
    "random_filters": ("random filters", {}),
    "random_kernels": ("random kernels", dict(method="srgkp", grouping="random", search="random")),
}


def unpruned():
    """The network that all start from, evaluated as they are."""
    config = configs.default(data="cifar10", model="cifar_resnet", system="standard")
    pruned = prune_resnet20.get_config()
    for group in ("model", "attack", "eval"):
        config[group].update(pruned[group])
    config.init_from, config.system.loss, config.train.length = pruned.init_from, "natural", "0 steps"
    config.train.select_attack, config.train.criteria = pruned.train.select_attack, pruned.train.criteria
    return config


def get_recipe():
    runs, rows = {"unpruned": unpruned()}, {"unpruned": ("unpruned",)}
    for name, (label, fields) in METHODS.items():
        ways = (("0 steps", "-before", "at once"), (f"{EPOCHS} epochs", "", "trained on"))
        for length, suffix, what in ways[name == "sfp":]:  # SFP prunes after an epoch for the first time
            config = prune_resnet20.get_config()
            chosen = {"method": name, **fields}
            configs.override_all(config, [f"system.{field}={value}" for field, value in chosen.items()])
            config.train.length = length
            config.optim.backbone.schedule = "cosine"
            runs[name + suffix] = config
            rows[f"{label}, {what}"] = (name + suffix,)
    for config in runs.values():
        config.data.subset = 20_000
        config.train.select_examples = config.eval.n = 500
    return Recipe(runs, "ResNet-20 on CIFAR-10, pruned at 7/16", rows)
