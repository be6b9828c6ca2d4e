"""The config: every field with its default, how a file becomes one, and what may differ between two starts.

A config file defines `get_config(arg="") -> ConfigDict`, starting from `default()`.
"""

import difflib
import json
import math
import runpy
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from advmoe_jax.core import units
from advmoe_jax.core.errors import UserError, one_of, unknown_name
from advmoe_jax.core.files import write_text

# These say where things are, how they are computed and what is measured afterwards, not what is trained.
_FREE = ("eval.", "data.dir", "name", "model.dispatch")

_ANY, _POSITIVE, _COUNT = (0, math.inf, "0 or more"), (1, math.inf, "1 or more"), (0, math.inf, "0 (all) or more")
_RANGES = {
    "seed": (0, 2**32 - 1, "0 to 4294967295"), "eval.seed": (0, 2**32 - 1, "0 to 4294967295"),
    "data.subset": _COUNT, "data.batch_size": _POSITIVE, "data.pad": _ANY,
    "system.beta": _ANY, "system.balance_loss": _ANY, "attack.num_steps": _POSITIVE, "attack.router_weight": _ANY,
    "system.router_every": _POSITIVE, "train.num_examples": _POSITIVE, "eval.n": _COUNT, "eval.batch_size": _POSITIVE,
    **{f"optim.{group}.{name}": _ANY for group in ("backbone", "router")
       for name in ("learning_rate", "weight_decay", "clip_norm")},
    **{f"optim.{group}.momentum": (0, 1, "0 to 1") for group in ("backbone", "router")},
}

METHODS = {
    "advmoe": dict(system="advmoe", loss="trades", num_experts=2, model_scale=0.5),
    "at_moe": dict(system="standard", loss="trades", num_experts=2, model_scale=0.5),
    "at_sdense": dict(system="standard", loss="trades", num_experts=1, model_scale=0.5),
    "at_dense": dict(system="standard", loss="trades", num_experts=1, model_scale=1.0),
    "natural": dict(system="standard", loss="natural", num_experts=1, model_scale=1.0),
}
"""AdvMoE and the trainings that it is compared to, by the name that a config file's argument takes."""


def default() -> ConfigDict:
    """All fields with AdvMoE's default recipe on CIFAR-10."""
    group = dict(learning_rate=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine", warmup="0%", clip_norm=0.0)
    return ConfigDict(dict(
        name="",
        seed=0,
        data=dict(
            name="cifar10",  # a module of advmoe_jax.data, or "tfds:<name>"
            dir="data",  # where `python -m advmoe_jax.data.prepare` put it
            subset=0,  # keep the first n training images; 0 for all
            batch_size=128,  # global
            pad=4, flip=True),  # augmentation
        model=dict(
            name="resnet",  # a module of advmoe_jax.models
            depth=18, stem="cifar",
            width=64,  # channels of the first stage of the dense network
            num_experts=2,  # N
            model_scale=0.5,  # r, the share of the channels that an expert has
            experts="shared",  # shared | disjoint channels
            expert_init="equal",  # equal | independent
            routing="layer",  # layer | embedding | global
            router_width=16,
            router_grad="ste_full",  # ste_full | ste_selected | scaled
            dispatch="auto"),  # how experts are computed: auto | all | blocks | grouped | host, see ops/dispatch.py
        system=dict(
            name="advmoe",  # a module of advmoe_jax.systems
            loss="trades",  # natural | madry | trades | mart
            beta=6.0,  # 1 / lambda
            router_loss="trades",  # trades | label_mod
            balance_loss=0.0,
            order="router_first",  # router_first | backbone_first
            share_batch=False,  # one batch for both levels
            share_attack=False,  # and one adversary
            router_every=1),  # update the router in every so many iterations
        attack=dict(  # of training
            norm="linf", eps="8/255", step_size="0.625 eps", num_steps=2, start="gaussian",
            router_grad="none",  # none | ste_selected | ste_full | scaled
            router_weight=0.0),
        optim=dict(
            backbone=dict(group),
            router=dict(group, learning_rate=0.01, warmup="5%", clip_norm=1.0)),
        train=dict(
            length="100 epochs",
            eval_every="1 epochs", save_every="1 epochs", log_every="20 steps",
            select_on="validation",  # validation | test (as papers do; optimistic)
            attack="pgd(num_steps=10)", num_examples=1000),  # what selects the best checkpoint
        eval=dict(
            attacks="pgd",  # each alone, with options: "fgsm pgd(num_steps=20,norm=l2,eps=0.5)"
            suite="",  # in their place: a name in attacks/suites.py, or attacks that count as one worst case
            norm="", eps="",  # empty: those of training; several eps: "2/255,4/255,8/255"
            n=0,  # test images; 0 for all
            batch_size=250, seed=0),
    )).lock()


def load(text: str) -> ConfigDict:
    """Runs a config file.

    Args:
        text: "configs/digits_r18.py", or with an argument "configs/digits_r18.py:at_dense".
    Returns:
        Its config; `name` is the file's name, and the argument behind an underscore.
    Raises:
        UserError: there is no such file, it fails, or it sets a field that does not exist.
    """
    path, _, argument = text.partition(":")
    if not Path(path).is_file():
        near = sorted(str(p) for p in Path(path).parent.glob("*.py")) if Path(path).parent.is_dir() else ()
        raise unknown_name("config file", path, near) if near else UserError(
            f"no config file {path}: expected a path such as configs/digits_r18.py")
    try:
        config = runpy.run_path(path)["get_config"](*([argument] if argument else []))
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}," if lines else path
        raise UserError(f"config file {where} fails: {type(error).__name__}: {_last_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} returns {type(config).__name__}: expected a ConfigDict, from default()")
    config.name = "_".join(filter(None, (Path(path).stem, argument)))
    return config


def _last_line(error: Exception) -> str:
    """What an exception says; ml_collections explains at length and ends with the point, and KeyError quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (text.splitlines() or [""])[-1]


def override(config: ConfigDict, text: str) -> None:
    """Sets a field in place.

    Args:
        config: what to change.
        text: "model.width=32"; the value is read as the type that the field has.
    Raises:
        UserError: no such field, or a value of another type.
    """
    name, equals, value = text.partition("=")
    fields = flatten(config)
    if name not in fields:
        raise _unknown_field(name, fields)
    if not equals:
        raise UserError(f"--config.{name} has no value: expected --config.{name}={fields[name]}")
    kind = type(fields[name])
    config.update_from_flattened_dict({name: _parse(name, value, kind)})


def _unknown_field(name: str, fields) -> UserError:
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    group = name.rpartition(".")[0]
    siblings = [field for field in fields if field.rpartition(".")[0] == group]
    hint = f"; did you mean {near[0]}?" if near else ""
    groups = dict.fromkeys(field.partition(".")[0] for field in fields)
    expected = f"one of {', '.join(siblings)}" if group and siblings else f"a field of {', '.join(groups)}"
    return UserError(f"unknown config field {name}: expected {expected}{hint}")


def _parse(name: str, value: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        if kind is int:
            number = float(value)
            if not number.is_integer():
                raise ValueError
            return int(number)
        if kind is float and not math.isfinite(float(value)):
            raise ValueError
        return kind(value)
    except (ValueError, KeyError, OverflowError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UserError(f"config field {name} is {value!r}: expected {words.get(kind, kind.__name__)}") from None


def set_method(config: ConfigDict, method: str) -> None:
    """Sets system, loss, N and r to those of a name in METHODS."""
    if method not in METHODS:
        raise unknown_name("method in the config's argument", method, METHODS)
    values = METHODS[method]
    config.system.name, config.system.loss = values["system"], values["loss"]
    config.model.num_experts, config.model.model_scale = values["num_experts"], values["model_scale"]


def check(config: ConfigDict) -> None:
    """Raises UserError for a field whose value can be refused without building anything."""
    fields = flatten(config)
    for name, (low, high, words) in _RANGES.items():
        if not low <= fields[name] <= high:
            raise UserError(f"{name} is {fields[name]}: expected {words}")
    units.eps(config.attack.eps, config.attack.norm, "attack.eps")
    standard = default().attack
    if config.attack.norm != standard.norm and config.attack.eps == standard.eps:
        raise UserError(f"attack.norm is {config.attack.norm} and attack.eps still {standard.eps}, which is for "
                        f"{standard.norm}: expected an eps in that norm, such as 0.5 for l2 or 12 for l1")
    if config.eval.norm not in ("", config.attack.norm) and not config.eval.eps:
        raise UserError(f"eval.norm is {config.eval.norm} and eval.eps is not set: expected an eps in that norm, since "
                        f"attack.eps is for {config.attack.norm}")
    if config.eval.eps:
        for eps in config.eval.eps.split(","):
            units.eps(eps, config.eval.norm or config.attack.norm, "eval.eps")
    one_of("train.select_on", config.train.select_on, ("validation", "test"))
    for name in ("length", "eval_every", "save_every", "log_every"):
        amount, unit = units.length(config.train[name], f"train.{name}")
        if name == "length" and (amount < 1 or unit == "%"):
            raise UserError(f"train.length is {config.train.length!r}: expected for example '12 epochs' or '300 steps'")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"model.width": 64, ...}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
    """Fields that make two configs two experiments, as "model.width 64 (was 16)"."""
    a, b = flatten(ours), flatten(theirs)
    return [f"{name} {a.get(name)!r} (was {b.get(name)!r})" for name in sorted(a | b)
            if not name.startswith(_FREE) and a.get(name) != b.get(name)]


def write(config: ConfigDict, path: Path) -> None:
    """Writes it as JSON."""
    write_text(path, json.dumps(config.to_dict(), indent=2) + "\n")


def read(path: Path) -> ConfigDict:
    """Reads what `write` wrote; fields that have come since have their defaults."""
    try:
        stored = json.loads(path.read_text())
        config = default()
        config.update(stored)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no config of this version: {_last_line(error)}") from None
    return config
