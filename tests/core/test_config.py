"""The config: fields owned by the modules that read them, refused where they are wrong or have no effect."""

import dataclasses
import json
import re

import pytest
from ml_collections import ConfigDict

from advmoe_jax.core import config as configs
from advmoe_jax.core import fields, find, units
from advmoe_jax.core.errors import UserError
from advmoe_jax.train import loop


def _cases():
    """(overrides that name modules, field, setting) of every field of every module, once."""
    found, tried, waiting = {}, set(), [()]
    while waiting:
        chosen = waiting.pop(0)
        table = configs.table(dict(text.split("=") for text in chosen))
        for name, of in table.items():
            found.setdefault((name, of.default, of.least, of.most, of.above, of.choices), (chosen, name, of))
            new = [f"{name}={module}" for module in find.names(*of.room)] if of.room else []
            waiting += [(*chosen, text) for text in new if text not in tried]
            tried.update(new)
    return found


CASES = list(_cases().values())
each = pytest.mark.parametrize("chosen, name, of", CASES, ids=[
    " ".join((name, *chosen)) for chosen, name, _ in CASES])


def _config(*overrides):
    config = configs.default()
    configs.override_all(config, list(overrides))
    return config


def _one_line(error):
    assert "\n" not in str(error.value) and "expected" in str(error.value)
    return str(error.value)


def test_every_module_brings_its_fields():
    names = {name for _, name, _ in CASES}
    assert {"system.order", "system.trains", "model.num_members", "model.member", "model.depth",
            "optim.router.momentum", "optim.backbone.momentum", "data.name", "attack.eps", "train.attack",
            "train.length", "eval.suite", "init_from", "seed"} <= names
    for group, room in (("data", ("data", "dataset")), ("model", ("models", "backbone", "model")),
                        ("system", ("systems", "make"))):
        for module in find.names(*room):
            assert configs.default(**{group: module})[group].name == module


@each
def test_a_default_passes_its_own_check(chosen, name, of):
    of.check(name, of.default)
    assert of.what and not of.what.endswith(".") and "\n" not in of.what
    config = _config(*chosen)
    assert configs.flatten(config)[name] == dict(text.split("=") for text in chosen).get(name, of.default)


def _wrong(of):
    """Values of another type; a ConfigDict itself makes True of a float 1.0."""
    yield from (None, [1], (1, 2))
    yield from {bool: ("yes", 1, 0.0), int: ("3", 1.5, True), float: ("fast", "1"), str: (3, 0.5, True)}[
        type(of.default)]


def _outside(of):
    """Values beyond a bound, by as little as there is, and far off; texts that cannot be read."""
    number, little = type(of.default) in (int, float), 1 if type(of.default) is int else 1e-6
    if number and of.least > float("-inf"):
        yield from (of.least - little, of.least - 10**12)
    if number and of.most < float("inf"):
        yield from (of.most + little * max(1, of.most), of.most + 10**12)
    if number and of.above > float("-inf"):
        yield from (type(of.default)(of.above), of.above - little)
    if number and of.read is not None:
        yield -1
    if type(of.default) is float:
        yield from (float("nan"), float("inf"))
    if type(of.default) is str:
        yield from ("a\nb", "a\0b")
    if of.read in (units.length, loop._length_of_training):
        yield from ("999999999999 epochs", "1e300 steps", "200%", "1e999")
    if of.choices or (of.read is not None and type(of.default) is str):
        yield from ("no such value", "\n")


@each
def test_a_value_of_another_type_or_out_of_range_is_refused_by_name(chosen, name, of):
    """Else a typing error in a config file would end in the middle of a run, or not at all."""
    for value in (*_wrong(of), *_outside(of)):
        config = ConfigDict(_config(*chosen).to_dict())  # which takes more than a config's own kind
        group, _, last = name.rpartition(".")
        place = config
        for part in filter(None, group.split(".")):
            place = place[part]
        with place.ignore_type():
            place[last] = value
        with pytest.raises(UserError) as error:
            configs.check(config) if not of.room else configs.complete(config)
        assert "\n" not in str(error.value)
        assert re.search(rf"(^|\s){re.escape(name)}\b", str(error.value)), (value, str(error.value))
        assert "expected" in str(error.value)


@each
def test_a_number_has_bounds(chosen, name, of):
    """No number is meant to be of any size; the bounds themselves are taken."""
    if type(of.default) in (int, float) and of.read is None:
        assert of.most < float("inf") and max(of.least, of.above) > float("-inf")
        for bound in (of.least, of.most):
            if abs(bound) < float("inf"):
                of.check(name, type(of.default)(bound))


def test_complete_adds_what_is_missing():
    config = configs.complete(ConfigDict({"system": {"name": "standard", "loss": "madry"}, "seed": 3}))
    expected = configs.default(system="standard")
    expected.system.loss, expected.seed = "madry", 3
    assert config == expected and config.is_locked
    with pytest.raises(AttributeError):
        config.model.colour = "red"


@pytest.mark.parametrize("values, message", [
    ({"model": {"widht": 8}},
     "unknown config field model.widht: expected one of model.name, .*; did you mean model.width"),
    ({"sead": 3}, "unknown config field sead: expected a field of .*; did you mean seed"),
    ({"modle": {"width": 8}}, r"unknown config field modle.width: expected a field of .*; did you mean model.width\?$"),
    ({"model": {"name": "resent"}}, "unknown model.name 'resent': expected one of .*; did you mean 'resnet'"),
    ({"system": {"name": 3}}, "system.name is 3: expected text"),
    ({"model": {"num_members": 5}},
     "model.num_members is a field of model.name=dual, model.name=ensemble, model.name=mixture, model.name=team, and "
     "model.name is resnet: expected no such field, or one of these"),
    ({"system": {"name": "standard", "order": "backbone_first"}},
     "system.order is a field of system.name=advmoe, and system.name is standard: expected")])
def test_complete_refuses_what_nobody_reads(values, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        configs.complete(ConfigDict(values))
    _one_line(error)


def test_complete_drops_another_module_s_field_at_its_default():
    values = {"model": {"num_members": 3}, "system": {"name": "standard", "order": "router_first"}}
    config = configs.complete(ConfigDict(values))
    assert "num_members" not in config.model and "order" not in config.system
    assert config == configs.default(system="standard")


def test_names_choose_fields():
    """Fields of the module that was named before go where they are at their defaults, others stay as they are."""
    config = configs.default()
    config.model.width, config.system.loss = 8, "madry"
    assert "order" in config.system and "num_members" not in config.model
    configs.choose(config, system="standard", model="ensemble")
    assert "order" not in config.system and config.system.trains == "all"
    assert config.model.num_members == 3 and config.model.depth == 18, "and those of its members"
    assert (config.model.width, config.system.loss) == (8, "madry") and config.is_locked
    configs.choose(config, system="advmoe")
    config.system.order = "backbone_first"
    with pytest.raises(UserError, match="system.order is a field of system.name=advmoe, and system.name is standard"):
        configs.choose(config, system="standard")


def test_a_default_gives_way_to_that_of_the_module_that_is_named(monkeypatch):
    """What was set by hand stays, and what another module calls by the same name."""
    usual = configs.find.module

    @dataclasses.dataclass(frozen=True)
    class Other(usual("systems", "standard", "make").Config):
        loss: str = fields.setting("mart", "what is trained", choices=("madry", "mart"))

    monkeypatch.setattr(usual("systems", "standard", "make"), "Config", Other)
    for texts, loss in ((["system.name=standard"], "mart"), (["system.loss=madry", "system.name=standard"], "madry")):
        config = configs.default()
        for text in texts:
            configs.override(config, text)
        assert config.system.loss == loss


@pytest.mark.parametrize("name, of", [(name, of) for name, of in configs.table({}).items()
                                      if type(of.default) is float])
def test_true_is_no_number(name, of):
    """A plain ConfigDict would make it 1.0."""
    config = configs.default()
    for copy in (config, config.copy_and_resolve_references()):
        with pytest.raises(TypeError, match="is True: expected a number"):
            copy.update_from_flattened_dict({name: True})
        assert configs.flatten(copy)[name] == of.default


def test_overrides_name_modules_first():
    """In any order: of an ensemble "member" names a module too, and is there when the ensemble is."""
    texts = ["system.trains=router", "model.num_members=4", "model.depth=10", "model.member=resnet",
             "system.name=standard", "model.width=32", "model.name=ensemble", "attack.eps=4/255"]
    for order in (texts, texts[::-1]):
        config = _config(*order)
        assert (config.system.name, config.system.trains, config.model.member) == ("standard", "router", "resnet")
        assert (config.model.num_members, config.model.width, config.attack.eps) == (4, 32, "4/255")


@pytest.mark.parametrize("text, field, value", [
    ("model.width=1e2", "width", 100), ("model.model_scale=1", "model_scale", 1.0),
    ("model.stem=imagenet", "stem", "imagenet")])
def test_an_override_has_the_type_of_its_field(text, field, value):
    found = _config(text).model[field]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, message", [
    ("model.width=1.5", "config field model.width is '1.5': expected a whole number"),
    ("data.flip=maybe", "config field data.flip is 'maybe': expected true or false"),
    ("system.beta=nan", "config field system.beta is 'nan': expected a number"),
    ("model.width=inf", "config field model.width is 'inf': expected a whole number"),
    ("model.width", "--config.model.width has no value: expected --config.model.width=64"),
    ("model.wide=3", "unknown config field model.wide: expected one of model.name.*; did you mean model.width"),
    ("model=3", "unknown config field model"), ("=3", "unknown config field "),
    ("system.name=advmeo", "unknown system.name 'advmeo': expected one of .*advmoe, .*; did you mean 'advmoe'")])
def test_overrides_that_are_refused(text, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        _config(text)
    _one_line(error)


TEAM = ("system.name=standard", "model.name=ensemble")  # of members with routers of their own
DENSE = ("system.name=standard", "model.num_experts=1")


@pytest.mark.parametrize("overrides, words", [
    ((*DENSE, "model.routing=global"), "model.routing is 'global', which has no effect here: it is for "
                                       "model.num_experts of 2 or more; expected 'layer'"),
    ((*DENSE, "model.router_width=8"), "model.router_width is 8, which has no effect"),
    ((*DENSE, "optim.router.momentum=0.5"), "optim.router.momentum is 0.5, which has no effect here: it is for"),
    ((*DENSE, "optim.router.learning_rate=0.1"), "optim.router.learning_rate is 0.1, which has no effect"),
    ((*DENSE, "system.trains=backbone"), "system.trains is 'backbone', which has no effect"),
    ((*DENSE, "system.balance_loss=0.1"), "system.balance_loss is 0.1, which has no effect"),
    ((*DENSE, "attack.router_weight=1"), "attack.router_weight is 1.0, which has no effect"),
    (("system.name=standard", "system.trains=router", "optim.backbone.momentum=0.5"),
     "optim.backbone.momentum is 0.5, which has no effect"),
    (("system.name=standard", "system.trains=backbone", "optim.router.momentum=0.5"),
     "optim.router.momentum is 0.5, which has no effect"),
    (("system.name=standard", "system.loss=natural", "train.attack=fgsm"), "train.attack is 'fgsm', which has no"),
    (("system.loss=madry", "system.beta=3"), "system.beta is 3.0, which has no effect"),
    (("model.name=ensemble",), "system.name=advmoe needs model.num_experts of 2 or more: a network of one expert, or "
                               "an ensemble, trains with system.name=standard"),
    ((*TEAM, "system.trains=router"),
     "system.trains is 'router', which has no effect here: it is for one network with"),
    ((*TEAM, "system.balance_loss=0.1"), "system.balance_loss is 0.1, which has no effect"),
    ((*TEAM, "attack.router_weight=1"), "attack.router_weight is 1.0, which has no effect"),
    ((*TEAM, "optim.router.momentum=0.5"), "optim.router.momentum is 0.5, which has no effect"),
    (("model.num_experts=1",), "system.name=advmoe needs model.num_experts of 2 or more"),
    (("system.loss=natural",), "system.loss=natural has no adversary for system.name=advmoe"),
    (("system.share_attack=true",), "expected system.share_batch=true with it"),
    (("eval.norm=l2",), "eval.norm is l2 and eval.eps is not set"),
    (("attack.norm=l2",), "attack.norm is l2 and attack.eps still 8/255"), (("attack.eps=8",), "8/255"),
    (("train.attack=pdg",), "unknown attack 'pdg'"), (("train.select_attack=pdg",), "unknown attack 'pdg'"),
    (("eval.suite=standrad",), "unknown suite 'standrad'"), (("train.length=3%",), "train.length is '3%': expected")])
def test_what_does_not_fit_is_refused(overrides, words):
    config = _config(*overrides)
    with pytest.raises(UserError) as error:
        configs.check(config)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", [
    (), DENSE, ("model.routing=global", "model.router_width=8", "optim.router.momentum=0.5"),
    ("system.name=standard", "system.trains=router", "optim.router.momentum=0.5"),
    ("system.loss=madry", "system.router_loss=label_mod", "system.beta=3"),
    ("system.share_batch=true", "system.share_attack=true"), ("attack.norm=l2", "attack.eps=0.5"),
    ("eval.norm=l2", "eval.eps=0.5,1"), ("system.name=standard", "system.loss=natural", "model.num_experts=1"),
    (*TEAM, "model.num_experts=1"), (*TEAM, "model.routing=global", "attack.router_grad=ste_full")])
def test_what_fits_is_taken(overrides):
    configs.check(_config(*overrides))


def test_written_and_read_it_is_the_same(tmp_path):
    config = configs.default(system="standard", model="ensemble", data="digits")
    config.model.width, config.seed, config.init_from = 8, 3, "runs/a, runs/b"
    configs.write(config, tmp_path / "config.json")
    again = configs.read(tmp_path / "config.json")
    assert again == config and again.is_locked and configs.differences(again, config) == []


def test_a_field_that_has_come_since_has_its_default(tmp_path):
    path = tmp_path / "config.json"
    configs.write(configs.default(), path)
    stored = json.loads(path.read_text())
    del stored["train"]["several"]
    path.write_text(json.dumps(stored))
    assert configs.read(path) == configs.default()


@pytest.mark.parametrize("content, message", [
    (json.dumps({"seed": 0, "attack": {"num_steps": 2}}), "is of version 1, expected 2: runs of older versions"),
    (json.dumps({"version": 3}), "is of version 3, expected 2"), ("{", "is no config of this version"),
    ("[]", "is no config of this version"),
    (json.dumps({"version": 2, "model": {"colour": "red"}}), "is no config of this version: unknown config field")])
def test_a_config_that_cannot_be_read_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        configs.read(path)
    assert str(error.value).startswith(f"{path} {message}") and "\n" not in str(error.value)


FREE = {"name", "file", "argument", "run", "data.dir", "model.dispatch", "train.criteria"}


@pytest.mark.parametrize("name", [name for name, of in configs.table({}).items() if not of.room])
def test_what_makes_two_experiments(name):
    """Where things are and what is measured afterwards does not; everything else does."""
    ours, theirs = configs.default(), configs.default()
    old = configs.flatten(theirs)[name]
    value = {bool: lambda: not old, int: lambda: old + 1, float: lambda: old + 0.5, str: lambda: f"{old}x"}[type(old)]()
    ours.update_from_flattened_dict({name: value})
    free = name in FREE or name.startswith(("eval.", "export."))
    assert configs.differences(ours, theirs) == ([] if free else [f"{name} {value!r} (was {old!r})"])


def test_other_modules_are_another_experiment():
    told = configs.differences(configs.default(system="standard"), configs.default())
    assert "system.name 'standard' (was 'advmoe')" in told and "system.order None (was 'router_first')" in told
