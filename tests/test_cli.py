"""Bad input: one line, exit code 2, nothing written; and --help."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import DIGITS, REPO, flags, forget_configs, listing

from advmoe_jax import main
from advmoe_jax.bench import __main__ as bench
from advmoe_jax.core import cli, mesh
from advmoe_jax.core.errors import NonFiniteError, Preempted
from advmoe_jax.data import prepare
from advmoe_jax.evaluation import flags as suspicions
from advmoe_jax.train import checkpoint, loop

pytestmark = pytest.mark.usefixtures("tiny_resnet")
NATURAL = dict(eval__attacks="fgsm", train__length="1 steps")
BAD_FIELDS = {
    "field_typo": ("model.widht=32", "unknown config field model.widht", "did you mean model.width"),
    "group_typo": ("modle.width=32", "modle.width", "did you mean model.width"),
    "field_is_a_group": ("model=32", "unknown config field model"),
    "no_value": ("model.width", "--config.model.width has no value", "--config.model.width="),
    "int_is_text": ("model.width=abc", "model.width", "'abc'", "whole number"),
    "int_is_fraction": ("model.width=3.5", "model.width", "'3.5'", "whole number"),
    "bool_is_text": ("data.flip=maybe", "data.flip", "'maybe'", "true or false"),
    "float_is_text": ("system.beta=x", "system.beta", "'x'", "a number"),
    "float_is_nan": ("system.beta=nan", "system.beta", "nan"),
    "learning_rate_is_nan": ("optim.backbone.learning_rate=nan", "learning_rate", "nan"),
    "learning_rate_is_negative": ("optim.backbone.learning_rate=-1", "learning_rate", "-1"),
    "seed_is_too_large": ("seed=99999999999999999999", "seed"),
    "eps_8_for_linf": ("attack.eps=8", "attack.eps", "linf", "[0, 1]", "'8/255'"),
    "eps_is_negative": ("attack.eps=-0.1", "attack.eps", "'-0.1'", "0 or more"),
    "eps_is_text": ("attack.eps=abc", "attack.eps", "'abc'", "'8/255'"),
    "step_size_2_for_linf": ("train.attack=pgd(step_size=2)", "step_size of pgd is 2 for linf", "'2/255'"),
    "norm_without_eps": ("eval.norm=l2", "eval.norm is l2", "eval.eps"),
    "attack_norm_without_eps": ("eval.attacks=pgd(norm=l2)", "pgd has norm=l2 and no eps"),
    "eval_eps_8_for_linf": ("eval.eps=8", "eval.eps", "'8/255'"),
    "norm": ("attack.norm=linff", "'linff'", "did you mean 'linf'"),
    "attack_start": ("train.attack=pgd(start=gauss)", "'gauss'", "gaussian"),
    "attack_step_size": ("train.attack=pgd(step_size=big)", "step_size", "'big'"),
    "attack_router_grad": ("attack.router_grad=ste", "'ste'", "ste_full"),
    "attack_num_steps": ("train.attack=pgd(num_steps=0)", "num_steps of pgd is 0", "1 to 1000000"),
    "data_name": ("data.name=cifar11", "data.name 'cifar11'", "did you mean 'cifar10'"),
    "data_variant": ("data.name=digits:x", "digits has no variant 'x'"),
    "data_missing": ("data.name=cifar10", "python -m advmoe_jax.data.prepare cifar10 --out data"),
    "data_missing_for_tfds": ("data.name=tfds", "tfds:cifar10"),
    "data_pad": ("data.pad=-1", "data.pad", "-1"),
    "system_name": ("system.name=advmo", "system.name 'advmo'", "did you mean 'advmoe'"),
    "system_loss": ("system.loss=trade", "system.loss 'trade'", "did you mean 'trades'"),
    "system_order": ("system.order=router", "system.order 'router'", "router_first"),
    "router_loss": ("system.router_loss=label", "system.router_loss 'label'", "label_mod"),
    "model_name": ("model.name=resnt", "model.name 'resnt'", "did you mean 'resnet'"),
    "model_depth": ("model.depth=19", "model.depth", "'19'", "18"),
    "width_of_a_million": ("model.width=99999999999", "model.width is 99999999999", "16384"),
    "model_stem": ("model.stem=cifer", "model.stem 'cifer'", "did you mean 'cifar'"),
    "model_scale": ("model.model_scale=2", "model.model_scale is 2"),
    "model_scale_of_none": ("model.model_scale=0", "model.model_scale is 0.0: expected above 0 and at most 1"),
    "layer_without_channels": ("model.model_scale=0.2", "model.model_scale is 0.2", "none of the 4 channels",
                               "the first stage (model.width)", "expected 0.25 or more"),
    "images_of_no_such_stem": ("model.stem=imagenet", "8x8", "model.stem=imagenet", "33x33", "model.stem=cifar"),
    "routing": ("model.routing=layr", "model.routing 'layr'", "did you mean 'layer'"),
    "experts": ("model.experts=share", "model.experts 'share'", "did you mean 'shared'"),
    "expert_init": ("model.expert_init=same", "model.expert_init 'same'", "independent"),
    "router_grad": ("model.router_grad=ste_ful", "model.router_grad 'ste_ful'", "did you mean 'ste_full'"),
    "one_expert_with_advmoe": ("model.num_experts=1", "model.num_experts", "system.name=standard"),
    "no_adversary_with_advmoe": ("system.loss=natural", "system.loss", "trades"),
    "batch_larger_than_data": ("data.batch_size=5000", "5000", "1167 training images"),
    "batch_not_a_multiple": ("data.batch_size=6", "data.batch_size is 6", "multiple of the 4 devices"),
    "batch_of_none": ("data.batch_size=0", "data.batch_size is 0"),
    "subset_larger_than_data": ("data.subset=5000", "data.subset is 5000", "1297"),
    "length": ("train.length=long", "train.length", "'long'", "'12 epochs'"),
    "length_of_none": ("train.length=0 steps", "train.length"),
    "length_in_percent": ("train.length=10%", "train.length"),
    "eval_every": ("train.eval_every=often", "train.eval_every", "'often'"),
    "save_every": ("train.save_every=often", "train.save_every", "'often'"),
    "log_every": ("train.log_every=often", "train.log_every", "'often'"),
    "length_of_ages": ("train.length=999999999999 epochs", "train.length", "at most 2147483647"),
    "warmup_of_twice_the_length": ("optim.router.warmup=200%", "optim.router.warmup", "100%"),
    "schedule_to_infinity": ("optim.router.schedule=multistep(50%:1e300)", "schedule", "1000000"),
    "warmup": ("optim.router.warmup=slow", "warmup", "'slow'"),
    "schedule": ("optim.router.schedule=cosin", "'cosin'", "did you mean 'cosine'"),
    "select_on": ("train.select_on=tset", "train.select_on 'tset'", "did you mean 'test'"),
    "train_attack": ("train.attack=pdg", "attack 'pdg'", "did you mean"),
    "train_attack_eps": ("train.attack=pgd(eps=8)", "eps", "'8/255'"),
    "train_attacks": ("train.several=best", "train.several", "'best'", "worst"),
    "train_attack_of_another_model": ("train.attack=exits", "exits", "member_logits"),
    "old_attack_field": ("attack.num_steps=3", "unknown config field attack.num_steps", "attack.norm"),
    "select_attack": ("train.select_attack=pdg", "attack 'pdg'", "did you mean"),
    "select_attack_eps": ("train.select_attack=pgd(eps=8)", "eps", "'8/255'"),
    "select_attack_of_another_model": ("train.select_attack=exits", "exits", "member_logits", "MoE"),
    "eval_attack_of_another_model": ("eval.attacks=exits", "exits", "member_logits", "MoE"),
    "eval_attack_of_other_channels": ("eval.attacks=normalized", "3 numbers in std", "1 channels"),
    "train_attack_of_other_channels": ("train.attack=normalized", "3 numbers in std", "1 channels"),
    "members_of_a_network": ("model.num_members=2", "model.num_members is a field of", "model.name=ensemble"),
    "trains_of_advmoe": ("system.trains=router", "system.trains is a field of system.name=standard"),
    "init_from_nothing": ("init_from=nowhere", "init_from names nowhere", "config.json"),
    "init_from_what": ("init_from=nowhere@first", "'first'", "best"),
    "optimizer": ("optim.router.optimizer=sdg", "optim.router.optimizer", "did you mean 'sgd'"),
    "momentum": ("optim.backbone.momentum=2", "optim.backbone.momentum is 2", "0 to 1"),
    "batch_of_the_evaluation": ("eval.batch_size=0", "eval.batch_size is 0"),
    "eval_attack": ("eval.attacks=fgsm pdg", "attack 'pdg'", "did you mean"),
    "eval_attack_none": ("eval.attacks=", "no attack"),
    "eval_attack_setting": ("eval.attacks=pgd(num_step=3)", "'num_step'", "did you mean 'num_steps'"),
    "eval_attack_value": ("eval.attacks=pgd(num_steps=x)", "num_steps", "x"),
    "eval_attack_fraction": ("eval.attacks=pgd(num_steps=2.5)", "num_steps", "2.5"),
    "eval_attack_driver": ("eval.attacks=pgd(driver=hots)", "driver", "hots"),
    "eval_attack_syntax": ("eval.attacks=pgd(num_steps=3", "cannot be read"),
    "eval_attack_commas": ("eval.attacks=fgsm,pgd", "cannot be read"),
    "eval_images": ("eval.n=-1", "eval.n is -1"),
}
BAD_FLAGS = {
    "flag_typo": (["--wokdir", "x"], "'--wokdir'", "did you mean '--workdir'"),
    "config_flag_typo": (["--confg.model.width=3"], "'--confg.model.width'"),
    "stray_word": (["stray"], "'stray'"),
    "value_behind_a_space": (["--config.model.width", "32"], "--config.model.width=32"),
    "mode": (["--mode", "trian"], "--mode", "'trian'", "'train'"),
    "process_id": (["--coordinator", "localhost:1", "--num_processes", "2", "--process_id", "2"], "--process_id is 2"),
    "processes_without_coordinator": (["--num_processes", "2"], "--coordinator"),
    "process_id_without_coordinator": (["--process_id", "1"], "--coordinator"),
    "num_processes": (["--num_processes", "two"], "--num_processes", "'two'"),
    "num_processes_of_none": (["--coordinator", "localhost:1", "--num_processes", "0", "--process_id", "0"],
                              "--num_processes is 0"),
    "coordinator_without_port": (["--coordinator", "localhost", "--num_processes", "2"], "--coordinator", "host:port"),
    "coordinator_without_host": (["--coordinator", ":80", "--num_processes", "2"], "--coordinator is ':80'"),
    "port": (["--coordinator", "localhost:99999", "--num_processes", "2", "--process_id", "1"], "1 to 65535"),
    "coordinator_alone": (["--coordinator", "localhost:1"], "--num_processes None", "expected all three"),
    "which_process": (["--coordinator", "localhost:1", "--num_processes", "2"], "--process_id None", "all three"),
    "no_cluster": (["--coordinator", "auto"], "no TPU, Slurm, Open MPI or Kubernetes"),
    "join_timeout": (["--coordinator", "localhost:1", "--num_processes", "2", "--process_id", "0",
                      "--join_timeout", "0"], "--join_timeout is 0"),
    "norm_with_default_eps": (["--config.attack.norm=l2", "--config.attack.eps=8/255"], "attack.norm is l2", "8/255"),
    "router_loss_of_standard": (["--config.system.name=standard", "--config.system.router_loss=label_mod"],
                                "system.router_loss is a field of system.name=advmoe", "system.name is standard"),
    "images_smaller_than_the_stem": (["--config.data.name=cifar10", "--config.model.stem=imagenet"], "32x32", "33x33"),
    "images_smaller_than_the_head": (["--config.model.name=vgg", "--config.model.depth=11",
                                      "--config.model.form=released"], "8x8", "32x32", "model.form=cifar"),
    "stem_without_channels": (["--config.model.name=wide_resnet", "--config.model.depth=16", "--config.model.width=160",
                               "--config.model.model_scale=0.06"], "none of the 16 channels of the stem", "0.0625"),
    "growth_without_channels": (["--config.model.name=densenet", "--config.model.depth=40", "--config.model.width=24",
                                 "--config.model.model_scale=0.08"], "model.growth_rate", "0.0834 or more"),
    "order_of_standard": (["--config.system.name=standard", "--config.system.order=backbone_first"],
                          "system.order is a field of system.name=advmoe"),
    "routing_of_a_dense_model": (["--config.system.name=standard", "--config.model.num_experts=1",
                                  "--config.model.router_width=16", "--config.model.routing=global"],
                                 "model.routing is 'global'", "no effect", "model.num_experts of 2 or more"),
    "router_of_a_dense_model": (["--config.system.name=standard", "--config.model.num_experts=1",
                                 "--config.model.router_width=16", "--config.optim.router.momentum=0.5"],
                                "optim.router.momentum is 0.5", "no effect"),
    "attack_of_natural": (["--config.system.name=standard", "--config.system.loss=natural"],
                          "train.attack", "no effect", "system.loss other than natural"),
    "adaptive_on_a_dense_model": (["--config.system.name=standard", "--config.model.num_experts=1",
                                   "--config.model.router_width=16", "--config.eval.suite=adaptive"],
                                  "adaptive", "S-Dense"),
    "bucket_without_its_extra": (["--workdir", "gs://bucket/run"], "gs://bucket/run needs gcsfs", "advmoe_jax[gcs]"),
    "another_scheme": (["--workdir", "s3://bucket/run"], "s3://bucket/run", "gs://BUCKET/FOLDER"),
    "only_without_recipe": (["--only", "x"], "--only is for a recipe"),
    "wait_without_recipe": (["--wait"], "--wait is for a recipe"),
    "list_without_recipe": (["--list"], "--list is for a recipe"),
    "coordinator_auto_with_number": (["--coordinator", "auto", "--num_processes", "2"], "--num_processes"),
    "checkpoint_of_training": (["--checkpoint", "best"], "--checkpoint is for --mode evaluate"),
    "checkpoint": (["--mode", "evaluate", "--checkpoint", "bset"], "checkpoint", "'bset'", "did you mean 'best'"),
    "evaluate_nothing": (["--mode", "evaluate"], "no run in"),
    "report_with_config": (["--mode", "report"], "--mode report", "--workdir and no other flag"),
    "config_behind_no_flag": (["configs/digits_r18.py"], "--config configs/digits_r18.py"),
    "rounded_to_no_step": (["--config.train.length=0.4 steps"], "train.length", "'300 steps'"),
    "length_of_another_unit": (["--config.train.length=3 days"], "train.length", "'3 days'"),
}
BAD_CONFIGS = {
    "missing": ("digit_r18.py", None, "digit_r18.py", "did you mean", "digits_r18.py"),
    "missing_folder": ("nowhere/x.py", None, "nowhere/x.py", "configs/digits_r18.py"),
    "argument": ("digits_r18.py:advmo", None, "'advmo'", "did you mean 'advmoe'"),
    "syntax": ("mine.py", "def get_config(:\n", "mine.py", "SyntaxError", "line 1"),
    "raises": ("mine.py", "def get_config():\n    return 1 / 0\n", "mine.py, line 2", "ZeroDivisionError"),
    "unknown_field": ("mine.py", "from advmoe_jax.core import config\ndef get_config():\n    c = config.default()\n"
                                 "    c.model.widht = 3\n    return c\n", "mine.py", "widht"),
    "wrong_type": ("mine.py", "from advmoe_jax.core import config\ndef get_config():\n    c = config.default()\n"
                              "    c.model.width = 'wide'\n    return c\n", "mine.py"),
    "new_field": ("mine.py", "from advmoe_jax.core import config\ndef get_config():\n    c = config.default()\n"
                             "    c.model.update({'widht': 3})\n    return c\n", "mine.py", "widht"),
    "exits": ("mine.py", "def get_config():\n    raise SystemExit(0)\n", "mine.py, line 2", "SystemExit"),
    "cannot_say": ("mine.py", "class Odd(Exception):\n    def __str__(self):\n        return 1\n"
                              "def get_config():\n    raise Odd\n", "mine.py, line 5", "Odd"),
    "true_for_a_number": ("mine.py", "from advmoe_jax.core import config\ndef get_config():\n"
                                     "    c = config.default()\n    c.system.beta = True\n    return c\n",
                          "mine.py, line 4", "beta is True: expected a number"),
    "far_from_any_field": ("mine.py", "from advmoe_jax.core import config\ndef get_config():\n"
                                      "    c = config.default()\n    c.colour = 1\n    return c\n",
                           "mine.py, line 4", 'Key "colour" does not exist'),
    "none": ("mine.py", "from advmoe_jax.core import config\ndef get_config():\n"
                        "    c = config.default()\n    c.seed = None\n    return c\n", "mine.py: seed is None"),
    "out_of_range": ("mine.py", "from advmoe_jax.core import config\ndef get_config():\n"
                                "    c = config.default()\n    c.seed = -1\n    return c\n", "mine.py: seed is -1"),
    "recipe_of_a_list": ("mine.py", "from advmoe_jax.core.recipe import Recipe\ndef get_recipe():\n"
                                    "    return Recipe([1])\n", "mine.py"),
    "no_get_config": ("mine.py", "x = 1\n", "mine.py", "get_config"),
    "returns_nothing": ("mine.py", "def get_config():\n    pass\n", "mine.py", "get_config"),
    "no_argument_taken": ("mine.py:advmoe", "from advmoe_jax.core.config import default\n"
                                            "def get_config():\n    return default()\n", "mine.py", "argument"),
    "not_python": ("notes.md", "# Don't\n", "notes.md"),
}


@pytest.fixture
def refused(capfd, monkeypatch, tmp_path):
    """Runs a command line in an empty folder and checks that it is refused as it should be."""
    def accepted(*args, **kwargs):
        raise AssertionError("accepted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run", accepted)
    monkeypatch.setattr(mesh.jax.distributed, "initialize", accepted)

    def run(argv, *said):
        before = listing(tmp_path)
        capfd.readouterr()
        code = main.main(argv)
        out, err = capfd.readouterr()
        assert code == 2, err
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert out == ""
        for text in said:
            assert text in err
        assert listing(tmp_path) == before
        assert len(err) < 700 or "another config" in err
        return err

    return run


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_field(case, refused):
    setting, *said = BAD_FIELDS[case]
    refused([*flags("w"), f"--config.{setting}"], *said)


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flag(case, refused):
    extra, *said = BAD_FLAGS[case]
    refused([*flags("w"), *extra], *said)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_file(case, refused, tmp_path):
    name, content, *said = BAD_CONFIGS[case]
    shutil.copy(DIGITS, tmp_path)
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_text(content)
    refused(["--config", name, "--workdir", "w"], *said)


def test_no_config(refused):
    refused([], "--config is missing", "configs/digits_r18.py")
    refused(["--mode", "evaluate"], "--workdir")
    refused(["--mode", "report"], "--workdir")
    refused(["--mode", "report", "--workdir", "nowhere"], "no workdir matches 'nowhere'")
    refused(["--config"], "--config")


def test_config_is_a_folder(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    refused(["--config", "mine"], "no config file mine")


def test_workdir_is_a_file(refused, tmp_path):
    (tmp_path / "w").write_text("mine")
    refused(flags("w", "natural"), "w", "file")
    refused(flags("w/below/that", "natural"), "--workdir w/below/that", "file")


@pytest.mark.parametrize("content", (
    b'{"seed": ', b"[]", b'{"sead": 1}', b'{"model": 3}', b'{"model": {"width": "wide"}}', b"\xff"))
@pytest.mark.parametrize("mode", ("train", "evaluate"))
def test_damaged_config_json(content, mode, refused, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_bytes(content)
    refused([*flags("w", "natural"), "--mode", mode], "config.json")
    refused(["--mode", "evaluate", "--workdir", "w"], "config.json")


def test_evaluate_without_checkpoints(refused, tmp_path, trained):
    (tmp_path / "w").mkdir()
    shutil.copy(trained["small"] / "config.json", tmp_path / "w")
    refused(["--mode", "evaluate", "--workdir", "w"], "no best checkpoint", "train first")
    (tmp_path / "w" / "checkpoints" / "best").mkdir(parents=True)
    refused(["--mode", "evaluate", "--workdir", "w"], "no best checkpoint", "train first")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs of different width."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suspicions, "of_model", lambda *_: ())  # test_flags.py; here it would only compile
        for name, width in (("small", 4), ("wide", 8)):
            assert main.main(flags(folder / name, "natural", model__width=width, **NATURAL)) == 0
    return {name: folder / name for name in ("small", "wide")}


def test_workdir_of_another_config(refused, trained, tmp_path):
    shutil.copytree(trained["small"], tmp_path / "w")
    other = flags("w", "natural", model__width=8, seed=3, **NATURAL)
    for mode in ("train", "evaluate"):
        said = refused([*other, "--mode", mode], "another config", "model.width 8 (was 4)", "seed 3 (was 0)")
        assert "eval." not in said and "data.dir" not in said
    refused(["--mode", "evaluate", "--workdir", "w", "--config.model.width=8"], "model.width 8 (was 4)")


def test_unknown_checkpoint(refused, trained, tmp_path):
    shutil.copytree(trained["small"], tmp_path / "w")
    for name, *said in (("77", "step 77", "[1]"), ("bset", "'bset'", "did you mean 'best'"), ("-1", "-1")):
        refused(["--mode", "evaluate", "--workdir", "w", "--checkpoint", name], *said)


@pytest.fixture
def mixed(trained, tmp_path):
    """The workdir "w" of a finished run, with the checkpoints of another."""
    shutil.copytree(trained["small"], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints")
    shutil.copytree(trained["wide"] / "checkpoints", tmp_path / "w" / "checkpoints")
    return tmp_path / "w"


def test_checkpoint_of_another_config(refused, mixed):
    """It knows its config, whatever config.json says, or if there is none: the other run is not continued."""
    for mode in ("train", "evaluate"):
        refused([*flags("w", "natural", **NATURAL), "--mode", mode], "another config: model.width 4 (was 8)")
    (mixed / "config.json").unlink()
    refused(flags("w", "natural", **NATURAL), "another config: model.width 4 (was 8)")


def test_checkpoint_under_the_name_of_another_step(refused, trained, tmp_path):
    shutil.copytree(trained["small"], tmp_path / "w")
    (tmp_path / "w" / "checkpoints" / "last" / "1").rename(tmp_path / "w" / "checkpoints" / "last" / "7")
    refused(flags("w", "natural", **NATURAL), "checkpoints/last/7 holds the checkpoint of step 1")


@pytest.mark.parametrize("known", ["config.json", "results.json"])
def test_a_run_of_which_nothing_is_saved_may_begin_anew(known, trained, tmp_path, refused):
    """With a corrected config; not where results of the other one would be taken for its own."""
    (tmp_path / "w").mkdir()
    for name in {"config.json", known}:
        shutil.copy(trained["small"] / name, tmp_path / "w")
    other = flags("w", "natural", model__width=8, **NATURAL)
    if known == "results.json":
        refused(other, "another config: model.width 8 (was 4)")
    else:
        with pytest.raises(AssertionError, match="^accepted$"):
            main.main(other)
        assert json.loads((tmp_path / "w" / "config.json").read_text())["model"]["width"] == 8


def test_a_folder_of_other_things(refused, trained, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("mine")
    refused(flags("w", "natural", **NATURAL), "--workdir w holds thesis.tex, and no run")
    (tmp_path / "three.py").write_text("from advmoe_jax.core.recipe import Recipe\n"
                                       "from advmoe_jax.core.config import default\n"
                                       "def get_recipe():\n    return Recipe(dict(a=default(data='digits')))\n")
    refused(["--config", "three.py", "--workdir", "w"], "--workdir w holds thesis.tex, and no run or recipe")


def test_only_the_best_checkpoint_is_left(trained, tmp_path):
    """It can be evaluated."""
    shutil.copytree(trained["small"], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "checkpoints" / "last")
    assert main.main(["--mode", "evaluate", "--workdir", str(tmp_path / "w"), "--checkpoint", "best"]) == 0
    assert not (tmp_path / "w" / "checkpoints" / "last").exists()


def test_a_checkpoint_that_is_rotated_away_while_it_is_read(trained, tmp_path, monkeypatch, capfd):
    """The run goes on and saves newer ones: the newest is evaluated."""
    shutil.copytree(trained["small"], tmp_path / "w")
    last, read = tmp_path / "w" / "checkpoints" / "last", checkpoint._read_arrays
    forget_configs(tmp_path / "w")

    def rotated(folder, **how):
        if (last / "1").exists():
            (last / "1").rename(last / "2")
        return read(folder, **how)

    monkeypatch.setattr(checkpoint, "_read_arrays", rotated)
    monkeypatch.setattr(suspicions, "of_model", lambda *_: ())
    assert main.main(["--mode", "evaluate", "--workdir", str(tmp_path / "w"), "--checkpoint", "last"]) == 0
    assert "the last checkpoint (step 2)" in capfd.readouterr().out


def test_what_killed_saves_left_is_removed(trained, tmp_path):
    shutil.copytree(trained["small"], tmp_path / "w")
    before = listing(tmp_path / "w").keys()
    (tmp_path / "w" / "checkpoints" / "last" / "5.orbax-checkpoint-tmp-0" / "state").mkdir(parents=True)
    (tmp_path / "w" / ".metrics.jsonl.abcdefgh.part").write_text("half")
    assert main.main(flags(tmp_path / "w", "natural", **NATURAL)) == 0
    assert listing(tmp_path / "w").keys() == before


def test_checkpoint_of_another_architecture(refused, mixed, tmp_path):
    forget_configs(mixed)
    said = ("another architecture", "backbone/", "(8,)", "(4,)")
    refused(["--mode", "evaluate", "--workdir", "w"], *said)
    refused(["--mode", "evaluate", "--workdir", "w", "--checkpoint", "1"], *said)


def test_training_refuses_a_checkpoint_of_another_architecture(mixed, tmp_path, capfd):
    """What was finished stays so."""
    forget_configs(mixed)
    before = listing(tmp_path)
    assert main.main(flags(tmp_path / "w", "natural", **NATURAL)) == 2
    error = capfd.readouterr().err
    assert re.fullmatch(r"error: [^\n]+another architecture[^\n]+\n", error), error
    assert listing(tmp_path) == before


def test_damaged_checkpoint(refused, trained, tmp_path):
    shutil.copytree(trained["small"], tmp_path / "w")
    for path in (tmp_path / "w" / "checkpoints" / "best").rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[:100])
    refused(["--mode", "evaluate", "--workdir", "w", "--checkpoint", "best"], "cannot be read")


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    for flag in ("--config", "--mode", "--workdir", "--checkpoint", "--coordinator", "--num_processes", "--process_id"):
        assert any(line.startswith(f"  {flag} ") for line in lines), flag


def test_config_json_changed_by_hand(trained, refused, tmp_path):
    shutil.copytree(trained["small"], tmp_path / "w")
    path = tmp_path / "w" / "config.json"
    stored = json.loads(path.read_text())
    stored["optim"]["backbone"]["learning_rate"] = 0.5
    path.write_text(json.dumps(stored))
    refused(flags("w", "natural", **NATURAL), "optim.backbone.learning_rate 0.1 (was 0.5)")


@pytest.mark.parametrize("tool, argv, said", [
    (prepare, [], "--out"), (prepare, ["cifar10", "--out", "o", "--froce"], "--froce"),
    (prepare, ["cifr10", "--out", "o"], "did you mean 'cifar10'"),
    (bench, [], "name"), (bench, ["cnov"], "did you mean 'conv'"), (bench, ["conv", "--rounds", "0"], "--rounds is 0"),
    (bench, ["conv", "--plot", "conv.png"], "which draws nothing")])
def test_the_other_commands_refuse_in_one_line(tool, argv, said, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert tool.main(argv) == 2
    assert re.fullmatch(rf"error: [^\n]*{re.escape(said)}[^\n]*\n", capfd.readouterr().err)
    assert not listing(tmp_path)


@pytest.mark.parametrize("raised, code, said", [
    (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
    (OSError(28, "No space left on device", "runs/x"), 74, "error: runs/x: No space left on device"),
    (PermissionError(13, "Permission denied", "runs/x"), 2, "error: runs/x: Permission denied"),
    (Preempted("stopped"), 75, "error: stopped"), (NonFiniteError("NaN"), 4, "error: NaN")])
def test_endings(raised, code, said, capfd):
    def action():
        raise raised

    assert cli.ending(action) == code
    error = capfd.readouterr().err
    assert error.startswith(said) and error.count("\n") == 1


def test_a_reader_that_went_away():
    """As in `python -m advmoe_jax.main ... | head -1`."""
    script = "from advmoe_jax.core import cli; cli.leave(lambda: cli.ending(lambda: print('x' * 10**6)))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=REPO) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


def test_what_fails_ends_at_once(capfd, monkeypatch):
    """With its traceback; nothing that waits at exit is waited for."""
    def ends(code):
        raise SystemExit(code)

    monkeypatch.setattr(cli.os, "_exit", ends)
    for main_, code in ((lambda: 75, 75), (lambda: 1 / 0, 1), (lambda: 0, None)):
        with pytest.raises(SystemExit) as ended:
            cli.leave(main_)
        assert ended.value.code == code
    assert capfd.readouterr().err.count("ZeroDivisionError") == 1


def test_a_backend_that_is_not_there(tmp_path):
    done = subprocess.run([sys.executable, "-m", "advmoe_jax.main", *flags("w", model__depth=10)],
                          capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "abacus"})
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*JAX_PLATFORMS: abacus[^\n]*\n", done.stderr), done.stderr
    assert not listing(tmp_path)
