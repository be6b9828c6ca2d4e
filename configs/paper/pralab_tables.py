"""The tables of the AdversarialPruningBenchmark (Piras et al.), with the MACs that they lack.

ResNet-18 on CIFAR-10; the argument vgg16 is VGG-16 on CIFAR-10, svhn ResNet-18 on SVHN. Weights go one by one, 90, 95
and 99 % of them, or whole filters, 50, 75 and 90 %. Clean accuracy and AutoAttack at 8/255 on all test images, of the
best checkpoint by held-out images. R-ADMM, HYDRA, HARP and MAD prune one adversarially trained network; beside them
the smallest weights go (magnitude), or random ones, and the rest trains as long as the others' phases together. RST,
Twin-Rep and Flying Bird begin with random weights and train as long as all of it; they and MAD are for single weights.
The benchmark prints no numbers that could be had for filters and for VGG-16: there ours stand alone.

The networks are trained by TRADES for 100 epochs, searched or drawn for 20, and trained on for 100, as HYDRA and HARP
do it. The benchmark's own runs are of each method's code, with its own schedule and, R-ADMM, Madry's loss. The argument
digits is the narrow ResNet-18 of configs/digits_r18.py, for a fifth of the epochs, eps 0.1, on 128 images.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data  (svhn)
          python -m advmoe_jax.main --config configs/paper/pralab_tables.py
          python -m advmoe_jax.main --config configs/paper/pralab_tables.py:vgg16
          python -m advmoe_jax.main --config configs/paper/pralab_tables.py:digits --only "base,*-us90,*-s75"
          --only takes the base and what is pruned by 90 % of the weights or 75 % of the filters
Hardware: accelerators; 55 runs of 20 to 220 epochs of adversarial training, most with AutoAttack on its test set.
          Digits: 2 CPU cores.
Time:     not measured yet.
Expected: not run yet. The benchmark's numbers stand beside.
"""

import pathlib
import sys

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import unknown_name
from advmoe_jax.core.recipe import Line, Printed, Recipe
from advmoe_jax.models import normalisation

sys.path.append(str(pathlib.Path(__file__).parents[1]))
import digits_r18  # noqa: E402, the settings of the argument digits

RATES = {"us": {90: "9/10", 95: "19/20", 99: "99/100"}, "s": {50: "1/2", 75: "3/4", 90: "9/10"}}
"""Shares that go, of single weights (unstructured) and of filters (structured), by percent."""
UNITS = {"us": "weight", "s": "filter"}
WHAT = {"us": "weights one by one", "s": "whole filters"}
NETS = {"resnet18": ("resnet", 18, "cifar10"), "vgg16": ("vgg", 16, "cifar10"), "svhn": ("resnet", 18, "svhn"),
        "digits": ("resnet", 18, "digits")}
METHODS = {"radmm": "R-ADMM", "hydra": "HYDRA", "harp": "HARP", "mad": "MAD", "rst": "RST", "twin_rep": "TwinRep",
           "flying_bird": "Flying Bird", "magnitude": "magnitude", "random": "random"}
CLEAN, ROBUST = "SA", "RA by standard"
BENCHMARK = {  # clean and AutoAttack at 90, 95 and 99 %, of single weights
    "resnet18": {
        "R-ADMM": (80.54, 43.68, 79.33, 42.56, 71.17, 37.21), "HYDRA": (76.74, 43.34, 76.16, 42.45, 72.21, 38.80),
        "HARP": (83.38, 45.40, 83.38, 45.69, 83.11, 45.50), "MAD": (73.67, 41.10, 70.70, 38.96, 58.90, 29.26),
        "RST": (60.92, 14.31, 56.93, 16.76, 48.90, 15.16), "TwinRep": (76.37, 42.93, 73.19, 41.47, 64.97, 36.10),
        "Flying Bird": (80.69, 46.49, 77.42, 46.10, 75.40, 42.02)},
    "svhn": {
        "HYDRA": (90.95, 44.12, 89.91, 45.29, 85.71, 34.20), "HARP": (92.96, 45.39, 92.75, 45.95, 93.38, 34.42),
        "RST": (79.89, 34.15, 74.90, 31.94, 61.55, 25.35), "TwinRep": (88.90, 46.72, 88.59, 47.16, 85.09, 43.44),
        "Flying Bird": (92.60, 39.81, 91.14, 47.43, 92.15, 41.80)}}


def settings(net):
    """A dense network by TRADES, attacked by AutoAttack."""
    model, depth, data = NETS[net]
    if data == "digits":
        config = digits_r18.get_config("at_dense")
        config.eval.n = 128
    else:
        config = configs.default(data=data, model=model, system="standard")
        config.model.update(dict(depth=depth, num_experts=1, model_scale=1.0))
        config.model.mean, config.model.std = normalisation.CIFAR10
        config.data.flip = data != "svhn"
    config.eval.suite = "standard"
    return config


def run(net, system, epochs, init_from="", learning_rate=0.1, **fields):
    """A run of the recipe; fields are those of the system."""
    config = settings(net)
    configs.choose(config, system=system)
    config.system.loss = "trades"
    config.init_from, config.train.length = init_from, f"{epochs // (5 if net == 'digits' else 1)} epochs"
    config.optim.backbone.learning_rate = learning_rate
    configs.override_all(config, [f"system.{name}={value}" for name, value in fields.items()])
    return config


def pruned(net, kind, percent):
    """{name: config} of all that is pruned by one share."""
    of = dict(rate=RATES[kind][percent], kernels="every")
    unit, name = dict(unit=UNITS[kind]), f"{kind}{percent}"

    def left(init_from, method, epochs=100, **more):
        told = dict(kernels="every") if method == "given" else of
        return run(net, "prune", epochs, init_from, 0.01, method=method, **told, **more)

    found = {
        f"admm-{name}": run(net, "admm", 20, "base", 0.01, admm_every="10%", **of, **unit),
        f"radmm-{name}": left(f"admm-{name}@last", "magnitude", **unit)}
    for search, method, more in (("search", "hydra", {}), ("rates", "harp", dict(learn_rates="true"))):
        if kind == "us" or method == "harp":  # HYDRA is for single weights
            found[f"{search}-{name}"] = run(net, "mask_search", 20, "base", **of, **unit, **more)
            found[f"{method}-{name}"] = left(f"{search}-{name}@last", "given")
    if kind == "us":
        found[f"mad-{name}"] = left("base", "mad", 120)
        for scratch in ("rst", "twin_rep", "flying_bird"):
            found[f"{scratch}-{name}"] = run(net, scratch, 220, rate=RATES[kind][percent])
    found[f"magnitude-{name}"] = left("base", "magnitude", 120, **unit)
    found[f"random-{name}"] = left("base", "random_weights", 120, **unit)
    return found


def table(net, kind, runs):
    """The table of single weights, or of filters."""
    lines = [Line("AT(Dense)", runs=("base",))]
    known = BENCHMARK.get(net, {}) if kind == "us" else {}
    for place, percent in enumerate(RATES[kind]):
        for method, label in METHODS.items():
            name = f"{method}-{kind}{percent}"
            values = dict(zip((CLEAN, ROBUST), known.get(label, ())[2 * place:2 * place + 2]))
            if values or name in runs:
                lines.append(Line(f"{label}, {percent} %", printed=values, runs=(name,) if name in runs else ()))
    notes = ("RA: AutoAttack, linf 8/255; the benchmark's eps is 0.031. Both accuracies are of the best checkpoint.",
             "MACs are those of what is left. Of single weights that is no time saved where zeros are multiplied too.")
    return Printed(f"{WHAT[kind].capitalize()} gone, {net} on {NETS[net][2]}", (CLEAN, ROBUST, "MACs, M", "params, M"),
                   tuple(lines), notes)


def get_recipe(net="resnet18"):
    if net not in NETS:
        raise unknown_name("network in the recipe's argument", net, NETS)
    runs = {"base": run(net, "standard", 100)}
    for kind, rates in RATES.items():
        for percent in rates:
            runs |= pruned(net, kind, percent)
    return Recipe(runs, f"Adversarial pruning, {net}", {name: (name,) for name in runs},
                  tables=tuple(table(net, kind, runs) for kind in RATES))
