"""RT-ER and JTDMoE beside what they are compared to: mixtures of whole networks behind a linear gate.

Zhang et al., ICML 2025: a mixture trained on clean images; one by adversarial training of the whole; by RT-ER; the dual
model of the first and the third, as they are; and a dual model trained jointly (JTDMoE). All are attacked through gate
and experts, past the gate, on each expert alone, and by misdirecting the gate (eval.suite=gated); the verdict is that
of the whole. `cifar10` has four ResNet-18, 130 epochs, and as the released code PGD-10 of step 2/255, batch 512, Adam,
with its learning rate of 0.0001 held constant where that cycles between it and its half, and without its cutout; the
gate learns by a straight-through gradient, where there it stays as it began (--config.system.gate_grad=served).
`digits`, which is there without an argument, has four narrow ones.

Command:  python -m advmoe_jax.main --config configs/rt_er.py
          python -m advmoe_jax.main --config configs/rt_er.py:cifar10
Hardware: 2 CPU cores; cifar10 one accelerator.
Time:     not measured yet.
Expected: not run yet.
"""

import cifar10_r18
import digits_r18

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import one_of
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.models import normalisation

DATA = {"digits": digits_r18, "cifar10": cifar10_r18}


def run(data, model="mixture", init_from="", **fields):
    """A run of the recipe; fields are those of the system."""
    config = DATA[data].get_config("at_dense")
    configs.choose(config, model=model, system="rt_er")
    config.model.update(num_experts=1, model_scale=1.0, num_members=4, gate="linear", serve="top-1",
                        expert_norm="training")
    config.system.update(fields)
    config.init_from, config.eval.suite, config.eval.n = init_from, "gated", 256 if data == "digits" else 1000
    if data == "cifar10":
        config.model.mean, config.model.std = normalisation.CIFAR10
        config.data.batch_size, config.data.pad, config.train.length = 512, 2, "130 epochs"
        config.optim.backbone.update(optimizer="adam", learning_rate=1e-4, weight_decay=0.0, schedule="constant")
        if config.system.loss != "natural":
            config.train.attack = "pgd(num_steps=10,step_size=2/255,keep=last)"
    return config


def get_recipe(data="digits"):
    one_of("data in the recipe's argument", data, DATA)
    runs = {"natural": run(data, loss="natural"), "at": run(data, experts="none"), "rt_er": run(data),
            "dual": run(data, "dual", "natural, rt_er"), "jtdmoe": run(data, "dual", experts="every")}
    runs["dual"].train.length = "0 steps"
    rows = {"natural mixture": ("natural",), "AT of the whole mixture": ("at",), "RT-ER": ("rt_er",),
            "dual model of the natural mixture and RT-ER": ("dual",),
            "dual model, trained jointly (JTDMoE)": ("jtdmoe",)}
    return Recipe(runs, f"Mixtures of whole networks, {data}", rows)
