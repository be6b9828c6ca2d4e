"""The README's table on digits: five methods, two budgets, three seeds.

Command:  python -m advmoe_jax.main --config configs/digits_table.py
          the same on as many machines as share runs/; --list shows how far it is; --only "advmoe-*" takes a part
Hardware: 2 CPU cores.
Time:     an hour for the 30 runs, one after the other.
Expected: README.md has the table.
"""

import digits_r18

from advmoe_jax.core.recipe import Recipe

LABELS = {"advmoe": "AdvMoE, N=2, r=0.5", "at_moe": "AT(MoE), joint", "at_sdense": "AT(S-Dense), r=0.5",
          "at_dense": "AT(Dense)", "natural": "natural Dense"}
BUDGETS, SEEDS = ("0.1", "0.2"), (0, 1, 2)


def get_recipe():
    runs, rows = {}, {}
    for seed in SEEDS:
        for eps in BUDGETS:
            for method, label in LABELS.items():
                config = digits_r18.get_config(method)
                config.attack.eps, config.seed = eps, seed
                name = f"{method}-eps{eps}-s{seed}"
                runs[name] = config
                rows.setdefault(label, []).append(name)
    return Recipe(runs, "Five trainings on digits, linf", rows)
