"""MoL on CIFAR-10, short: four experts of width 16 behind a gate of the same width, and MAX and AVG at the same cost.

Clean, linf 8/255, l2 1.0 and l1 16, the paper's strengths, on the first 10,000 training images as in
configs/cifar10_short.py. Experts stay dense; seven steps of PGD in place of twenty. No result of so few epochs says
anything about full training.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/mol_cifar10.py
Hardware: 2 CPU cores.
Time:     not measured yet; meant to take two hours.
Expected: not run yet.
"""

import cifar10_short

from advmoe_jax.core import config as configs
from advmoe_jax.core.recipe import Recipe

STEPS, EPOCHS, GATE_EPOCHS = 7, 4, 2
CLEAN = "rotation(limit=0)"  # the images as they are
STRENGTH = {"linf": "eps=8/255,step_size=0.01", "l2": "eps=1.0", "l1": "eps=16,l1_share=0.05"}
TRAINING = {"clean": CLEAN, **{norm: f"pgd(norm={norm},{of},num_steps={STEPS},keep=last,driver=device)"
                               for norm, of in STRENGTH.items()}}
SUITE = "mol-cifar-short: " + " ".join(f"pgd(norm={norm},{of},num_steps=20)" for norm, of in STRENGTH.items())


def run(system, epochs, attacks, init_from="", **fields):
    config = cifar10_short.get_config("at_dense")
    configs.choose(config, system=system)
    config.init_from, config.train.length, config.train.eval_every = init_from, f"{epochs} epochs", "0 steps"
    config.train.select_attack, config.data.jitter, config.data.turn = CLEAN, 0.25, 2.0
    config.optim.backbone.schedule = "piecewise(0:0,40%:1,80%:0.05,100%:0)"
    config.eval.n, config.eval.suite = 256, SUITE
    config.system.loss = "madry" if attacks else "natural"
    if attacks:
        config.train.attack = " ".join(attacks)
    for name, value in fields.items():
        configs.override(config, f"{name.replace('__', '.')}={value}")
    return config


def get_recipe():
    experts = {kind: run("standard", EPOCHS, [] if kind == "clean" else [attack]) for kind, attack in TRAINING.items()}
    gate = run("mol", GATE_EPOCHS, TRAINING.values(), ", ".join(experts))
    configs.choose(gate, model="mixture")
    configs.override_all(gate, ["model.num_experts=1", "model.model_scale=1", "model.width=16",
                                f"model.num_members={len(experts)}"])
    adversarial = [attack for kind, attack in TRAINING.items() if kind != "clean"]
    spent = EPOCHS * (1 + 3 * (STEPS + 1)) + GATE_EPOCHS * 5 * (1 + 3 * (STEPS + 1)) / 4  # passes of a network
    runs = experts | {
        "mol": gate, "max": run("standard", round(spent / (3 * STEPS + 2)), adversarial, train__several="largest"),
        "avg": run("standard", round(spent / (3 * STEPS + 3)), adversarial, train__several="mean")}
    rows = {f"M {kind}": (kind,) for kind in experts} | {"MoL (a)": ("mol",), "MAX (a)": ("max",), "AVG (a)": ("avg",)}
    return Recipe(runs, "MoL on CIFAR-10, short", rows, oracles={"oracle gate": tuple(experts)})
