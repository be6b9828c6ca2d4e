"""AdvMoE on CIFAR-10 nearly as the released code (OPTML-Group/Robust-MoE-CNN) trains it: not what the paper says.

One ResNet-20 on the image chooses for all layers; experts are disjoint; the router is a classifier of the label modulo
N, so that labels steer the routing; both updates take the same batch, the backbone's first; the training attack also
attacks the router; one learning rate, stepped by epoch; the best epoch is chosen on test images.

Three things still differ. There, the router's convolutions start from PyTorch's uniform distribution, here from
Kaiming's normal one; the router's scores that attacks move away from are of a training pass, here of an evaluation
pass; and BatchNorm is updated 4 times an iteration in the backbone and 6 times in the router, here twice in each.

Command:  python -m advmoe_jax.main --config configs/paper/advmoe_cifar10_r18_released.py
Hardware: one accelerator.
Time:     not measured yet.
Expected: not run yet; its users report NaN scores and one dead expert.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default()
    methods.choose(config, method)
    if config.model.num_experts > 1:
        config.model.routing = "global"
        config.model.experts = "disjoint"
        config.model.expert_init = "independent"
        config.model.router_grad = "ste_selected"
        config.attack.router_grad = "ste_selected"
        config.optim.router.learning_rate = 0.1
        config.optim.router.warmup = "0%"
        config.optim.router.clip_norm = 0.0
        config.optim.router.schedule = "cosine_epoch"
    if method == "advmoe":
        config.system.router_loss = "label_mod"
        config.system.order = "backbone_first"
        config.system.share_batch = True
        config.attack.router_weight = 1.0
    if config.system.loss != "natural":
        config.train.attack = "pgd(num_steps=2,step_size=5/255,start=gaussian,keep=last)"
    config.optim.backbone.schedule = "cosine_epoch"
    config.train.select_attack = "pgd(num_steps=10,step_size=2/255)"
    config.train.select_on = "test"
    return config
