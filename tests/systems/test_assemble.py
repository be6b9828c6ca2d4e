"""What a run is put together from must be what it says."""

import dataclasses

import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import digits
from advmoe_jax.models import model as models
from advmoe_jax.systems import assemble, standard

pytestmark = pytest.mark.usefixtures("tiny_resnet")


@pytest.fixture
def config():
    config = configs.default(data="digits", system="standard")
    configs.override_all(config, ["model.depth=4", "model.width=8", "model.num_experts=1", "system.loss=natural"])
    return config


def test_criteria_on_the_images_that_choose_the_best_checkpoint(config):
    """At no budget they are the clean accuracy, to the bit."""
    configs.override_all(config, [
        "train.criteria=fgsm fgsm(eps=0)", "train.select_attack=fgsm", "data.batch_size=16",
        "train.select_examples=16", "eval.batch_size=16", "attack.eps=0.1"])
    experiment = assemble.assemble(config)
    state = experiment.system.init(rng.key(0, "init"))
    (ra, sa), found = experiment.select(state), experiment.criteria(state)
    assert found == {"images": 16, "accuracy/fgsm linf 0.1": ra, "accuracy/fgsm linf 0": sa}
    config.train.criteria = ""
    assert assemble.assemble(config).criteria is None


def test_logits_of_other_classes(config, monkeypatch):
    usual = models.make
    monkeypatch.setattr(models, "make", lambda cfg, shape, classes, mesh: dataclasses.replace(
        usual(cfg, shape, classes + 1, mesh), num_classes=classes))
    with pytest.raises(UserError, match=r"gives logits of shape \(1, 11\) for one image: expected \(1, 10\)"):
        assemble.assemble(config)


def test_what_makes_no_system(config, monkeypatch):
    usual = standard.make
    for made, message in (
            (lambda *args: None, "make.. of advmoe_jax/systems/standard.py returns NoneType: expected a System"),
            (lambda *args: dataclasses.replace(usual(*args), every={"often": None}), "a key of System.every")):
        monkeypatch.setattr(standard, "make", made)
        with pytest.raises(UserError, match=message):
            assemble.assemble(config)


def test_what_is_no_data_set(config, monkeypatch):
    monkeypatch.setattr(digits, "dataset", lambda root, variant: ())
    with pytest.raises(UserError, match="dataset.. of advmoe_jax/data/digits.py returns tuple: expected a Dataset"):
        assemble.assemble(config)


def test_extra_data_are_read_for_training_alone(config, tmp_path):
    """They are none of the images that choose the best checkpoint, nor of an epoch; a run that is evaluated may have
    lost them, and is named by them all the same."""
    configs.override_all(config, [f"data.extra={tmp_path}/made.npz", "data.batch_size=16"])
    with pytest.raises(UserError, match="data.extra .*made.npz: there is no such file"):
        assemble.assemble(config)
    assert assemble.assemble(config, starts=False).system.describe.endswith(" (extra data: made.npz 70 %)")
    own = digits.dataset("").train
    np.savez(tmp_path / "made.npz", image=own.images[:7], label=own.labels[:7])
    experiment = assemble.assemble(config)
    assert len(experiment.data.train) == len(own) + 7 and len(experiment.data.select) == len(own)
    assert experiment.system.rows.max() < len(own) and len(experiment.system.rows) < len(own)
