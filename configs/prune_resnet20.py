"""A CIFAR ResNet that is pruned, then trained on: SR-GKP's setting, with any method of advmoe_jax/pruning.

Starts from a trained network, such as an imported one. Evaluated as in SR-GKP's tables, benign, FGSM at 0.01 and 0.1
and PGD-3 at 8/255 in units of normalised images, which are weak attacks; and in pixels, linf 0.5/255 and 1/255. The
paper's are measured after every epoch too, on held-out images (train.select_on=test: as the paper does), so that the
report has its rows "best by criterion".

Command:  python -m advmoe_jax.data.prepare cifar10 --out data
          python -m advmoe_jax.interop.torch_import --arch resnet20 --weights resnet20.th --out runs/resnet20
          python -m advmoe_jax.main --config configs/prune_resnet20.py
          (--config.init_from=WORKDIR, --config.system.method=fpgm, --config.system.rate=10/16, --config.model.depth=32,
          and for pruning alone --config.train.length="0 steps")
Hardware: one accelerator; on CPU see configs/pruning_cifar10.py.
Time:     not measured yet.
Expected: not run yet for 300 epochs. The paper reports for ResNet-32 and 7/16: benign 92.97, FGSM 70.57 and 29.31, PGD
          32.01, best of all epochs on test images.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.models import normalisation

_STD = f"std={normalisation.IMAGENET[1]}"
PAPER = (f"normalized(eps_sd=0.01,{_STD}) normalized(eps_sd=0.1,{_STD}) "
         f"normalized(num_steps=3,eps_sd=8/255,step_sd=2/255,labels=true,{_STD})")
PIXELS = "fgsm(eps=0.5/255) pgd(eps=0.5/255,num_steps=10) pgd(eps=1/255,num_steps=10)"


def get_config():
    config = configs.default(data="cifar10", model="cifar_resnet", system="prune")
    config.init_from = "runs/resnet20"
    config.model.num_experts, config.model.model_scale = 1, 1.0
    config.model.shortcut_pad = "both"
    config.model.mean, config.model.std = normalisation.IMAGENET
    config.attack.eps = "1/255"
    config.data.batch_size = 64
    config.train.length = "300 epochs"
    config.train.select_attack = "fgsm"
    config.train.criteria = PAPER
    config.optim.backbone.learning_rate = 0.01
    config.optim.backbone.schedule = "multistep(100 epochs:0.1,200 epochs:0.1)"
    config.eval.attacks = f"{PAPER} {PIXELS}"
    return config
