"""A mixture of DeiT-Tiny's MLPs on ImageNet, 224 pixels, linf eps 2/255: table 3 of AdvMoE, N=2, r=0.5.

Zhang et al., ICCV 2023, section 5: robust training of MoE-ViT, joint as Puigcerver et al. (NeurIPS 2022) train it
(at_moe), or in alternation. The paper says "ImageNet, DeiT-Tiny" and that other settings are those of its table 1, and
neither where experts are nor how many. Here they are as in V-MoE, in every second block, chosen by each token, with the
load-balance loss at V-MoE's weight; N and r are those of table 1; optimizer, schedule and weight decay are DeiT's, with
clipped gradients. V-MoE's experts of full size: --config.model.model_scale=1.

Command:  python -m advmoe_jax.data.prepare imagenet --raw FOLDER --out data
          (FOLDER holds the official tar archives, or the folders train and val)
          python -m advmoe_jax.main --config configs/paper/advmoe_vit.py
          python -m advmoe_jax.main --config configs/paper/advmoe_vit.py:at_moe  (at_dense, at_sdense, natural)
Hardware: accelerators, and a CPU core for every 400 images/s of training; --config.data.workers says how many.
Time:     not measured yet.
Expected: not run yet. The paper reports RA(PGD-50) 44.63 and SA 61.72 for joint training, 45.93 and 61.67 for AdvMoE,
          and 0.27e9 MACs for both, which DeiT-Tiny cannot have: dense it has 1.254e9, without any MLP 0.557e9; this
          mixture has 0.366e9, and 1.254e9 at r=1.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.models import normalisation
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default(data="imagenet", model="vit")
    methods.choose(config, method)
    config.data.batch_size = 512
    config.data.workers = 16
    config.model.mean, config.model.std = normalisation.IMAGENET
    config.attack.eps = "2/255"
    is_routed = config.model.num_experts > 1
    if is_routed:
        config.system.balance_loss = 0.01
    for group in (config.optim.backbone, *((config.optim.router,) if is_routed else ())):
        group.update(optimizer="adamw", learning_rate=5e-4, weight_decay=0.05, warmup="5%", clip_norm=1.0)
    return config
