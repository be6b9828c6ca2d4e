"""ResNet-18 on CIFAR-10, linf eps 8/255, with the ingredients of the published ones above 50 % under AutoAttack.

Without an argument: adversarial training by a PGD of ten steps, as IDBH's authors train (200 epochs, learning rate .1
times .1 at a half and at three quarters), with IDBH "strong", adversarial weight perturbation, label smoothing and an
average of the weights. "extra": TRADES with generated images, 70 % of each batch, as Wang et al. (ICML 2023) train
their wide networks (beta 5, batch 512, 400 epochs of the data set's images, learning rate .2, label smoothing .1).
Neither is the exact setting of a published row: they join what those rows have.

Command:  python -m advmoe_jax.main --config configs/paper/rn18_today.py
          python -m advmoe_jax.main --config configs/paper/rn18_today.py:extra --config.data.extra=1m.npz
Hardware: one accelerator.
Time:     not measured yet.
Expected: not run yet. Published of ResNet-18 under AutoAttack, without extra data: 52.48 (DAJAT; Addepalli et al.,
          NeurIPS 2022) and 52.46 (IDBH with AWP and averaged weights; Li & Spratling, ICLR 2023). With generated data:
          58.63 (100 million images; Gowal et al., NeurIPS 2021) and 57.09 (1 million images).
"""

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import one_of
from advmoe_jax.systems import methods

ARGUMENTS = ("extra",)  # of --config, in place of a method


def get_config(track=""):
    if track:
        one_of("track in the config's argument", track, ARGUMENTS)
    config = configs.default()
    methods.choose(config, "at_dense")
    config.system.label_smoothing = 0.1
    config.train.attack = "pgd(num_steps=10,step_size=2/255)"
    config.eval.suite = "standard"
    if track == "extra":
        config.system.beta = 5.0
        config.data.extra, config.data.extra_share = "1m.npz", 0.7
        config.data.batch_size = 512
        config.train.length = "400 epochs"
        config.train.ema = 0.995
        config.optim.backbone.learning_rate = 0.2
        config.optim.backbone.warmup = "10 epochs"
        return config
    config.system.loss = "madry"
    config.system.awp = 0.005
    config.data.augment = "idbh_strong"
    config.train.length = "200 epochs"
    config.train.ema = 0.999
    config.optim.backbone.schedule = "multistep(50%:0.1,75%:0.1)"
    return config
