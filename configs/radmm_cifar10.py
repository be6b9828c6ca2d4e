"""R-ADMM beside magnitude at the same sparsity: narrow ResNet-18, 90 % of all weights gone, CIFAR-10.

Ye et al., ICCV 2019: an adversarially trained network is drawn to a pruned copy of itself while it trains on, then its
smallest weights go and the rest trains. Beside it the smallest weights go at once (R-LWM), and the rest trains as long
as R-ADMM's both phases together. Data, network and sparsity are those of configs/hydra_cifar10.py. The paper updates
the copy ten times in 200 epochs; here it is updated ten times in three, and rho begins ten times larger, since
otherwise so few steps would not move the weights.

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.main --config configs/radmm_cifar10.py
          python -m advmoe_jax.main --config configs/radmm_cifar10.py:digits
Hardware: 2 CPU cores.
Time:     not measured yet; 17 epochs and four evaluations of 500 images, meant to take 35 minutes. Digits: less.
Expected: not run yet. At 90 % and full training R-ADMM's ResNet-18 has SA 80.5 and RA 43.7 by AutoAttack in the
          benchmark of adversarial pruning (Piras et al.).
"""

import hydra_cifar10

from advmoe_jax.core.recipe import Recipe


def get_recipe(data="cifar10"):
    drawn = hydra_cifar10.run(data, 3, "admm", "base", rate=hydra_cifar10.RATE, rho=0.01, admm_every="10%")
    drawn.optim.backbone.learning_rate, drawn.optim.backbone.schedule = 0.05, "constant"
    runs = {"base": hydra_cifar10.run(data, 5), "admm": drawn,
            "radmm": hydra_cifar10.left(data, 3, "admm@last", "magnitude"),
            "magnitude": hydra_cifar10.left(data, 6, "base", "magnitude")}
    rows = {"AT(Dense)": ("base",), "R-ADMM": ("radmm",), "R-ADMM, dense, before anything goes": ("admm",),
            "smallest weights gone (R-LWM)": ("magnitude",)}
    return Recipe(runs, f"R-ADMM at {hydra_cifar10.RATE} of the weights gone, {data}", rows)
