"""Narrow ResNet-18 on ten ImageNet classes (Imagenette), 64 pixels, linf eps 2/255.

Meant for few images, such as 2,400 for training and 800 for testing: its numbers say nothing about ImageNet.
Images are in [0, 1], with normalisation inside the model.

Command:  python -m advmoe_jax.data.prepare imagefolder:imagenette --raw FOLDER --out data   (FOLDER holds a tar archive
          of class folders for train and one for val, or the folders)
          python -m advmoe_jax.main --config configs/imagenette_r18.py
          python -m advmoe_jax.main --config configs/imagenette_r18.py:at_dense  (at_sdense, at_moe, natural)
Hardware: 2 CPU cores.
Time:     13 minutes and the evaluation, 3 minutes; `--config.eval.suite=quick --config.eval.n=200` 6 minutes more.
Expected: advmoe, 2,400 training images, one seed, 800 test images, PGD-50: best and last SA 37.8 RA 29.9 (on another
          machine best SA 34.3 RA 26.8, last SA 37.3 RA 28.3); suite quick on 200 of them: SA 38.5 RA 30.0. The others
          were not run.
"""

from advmoe_jax.core import config as configs
from advmoe_jax.models import normalisation
from advmoe_jax.systems import methods


def get_config(method="advmoe"):
    config = configs.default(data="imagefolder:imagenette")
    methods.choose(config, method)
    config.data.image_size, config.data.resize, config.data.scale = 64, 72, 0.25
    config.data.batch_size = 64
    config.model.stem = "imagenet"
    config.model.width = 16
    config.model.mean, config.model.std = normalisation.IMAGENET
    config.attack.eps = "2/255"
    config.train.length = "20 epochs"
    config.train.eval_every = "5 epochs"
    config.train.save_every = "5 epochs"
    config.eval.batch_size = 240  # the validation images in one batch, and no second shape to compile
    return config
