"""The config: how a file becomes one, who owns its fields, and what may differ between two starts.

A config file defines `get_config(arg="") -> ConfigDict`, starting from `default()`. Each group of fields belongs to the
modules that read it: a frozen dataclass of `core.fields.setting`s beside each `make`, and a function `check(config)`
where values of several fields must fit. A group that has a name ("model.name") has the fields of the module that is
named, so that a new module brings its own.
"""

import contextlib
import dataclasses
import difflib
import importlib
import json
import math
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from advmoe_jax.core import fields, find
from advmoe_jax.core.errors import UserError, shown, unknown_name
from advmoe_jax.core.fields import Setting, setting
from advmoe_jax.core.files import write_json

_OWNERS = {
    "data": ("data.pipeline:Config",), "model": ("models.model:Config",), "attack": ("systems.adversary:Config",),
    "system": ("systems.assemble:Config",), "train": ("train.loop:Config", "systems.adversary:Training",
              "models.model:Computing", "train.step:Config"),
    "optim": ("train.optim:Groups",), "eval": ("evaluation.plan:Config",), "export": ("interop.export:Config",)}
"""Modules below advmoe_jax and their dataclasses, by group; those of named modules are added."""

# These say where things are, how they are computed, what else is measured and exported, not what is trained.
_FREE = ("eval.", "export.", "data.dir", "name", "file", "argument", "run", "model.dispatch", "data.workers",
         "train.criteria")
OF_A_HOST = ("data.dir", "data.workers", "file")
"""Fields that may differ between the hosts of a run: where they find things, and how they read them."""
_VERSION = 2  # of config.json


@dataclasses.dataclass(frozen=True)
class Run:
    """Fields of a config that belong to no group."""

    name: str = setting("", "of the run; its workdir is runs/NAME unless --workdir says otherwise")
    file: str = setting("", "config file that the run came from")
    argument: str = setting("", "what stood behind the colon of --config")
    run: str = setting("", "name of the run in a recipe")
    seed: int = setting(0, "of everything random in training", least=0, most=2**32 - 1)
    init_from: str = setting("", "finished runs that it starts from: workdirs, or names of runs of the same recipe, "
                                 "with commas; NAME@last in place of the best checkpoint")


class _Fields(ConfigDict):
    """A ConfigDict that refuses true and false for a number, which it would make 1.0 and 0.0."""

    def __setitem__(self, key, value):
        if isinstance(value, bool) and isinstance(self.get(key), float):
            raise TypeError(f"{key} is {value}: expected {fields.WORDS[float]}")
        super().__setitem__(key, value)


def default(**names: str) -> ConfigDict:
    """All fields with their defaults.

    Args:
        names: of modules, by group: data="digits", model="resnet", system="standard".
    """
    return _nested({name: of.default for name, of in table({f"{group}.name": name for group, name in names.items()}
                                                           ).items()})


def table(values: Mapping[str, Any]) -> dict[str, Setting]:
    """Every field of a config by its name, given the names of modules among its values.

    Args:
        values: {"model.name": "resnet", ...}; what is missing has its default.
    """
    found = fields.settings(Run)
    for group, owners in _OWNERS.items():
        waiting = [getattr(importlib.import_module(f"advmoe_jax.{module}"), name)
                   for module, _, name in (owner.partition(":") for owner in owners)]
        while waiting:
            for name, of in fields.settings(waiting.pop(0), f"{group}.").items():
                value = values.get(name, of.default)
                found[name] = dataclasses.replace(of, default=value) if of.room else of
                if of.room:
                    own = getattr(_module(of, name, value), "Config", None)
                    waiting += [own] if own is not None else []
    return found


def _module(of: Setting, name: str, value: Any) -> ModuleType:
    of.check(name, value)
    return find.module(of.room[0], value.partition(":")[0], defines=of.room[1:], kind=name)


def owners(config: ConfigDict) -> Iterator[ModuleType]:
    """Every module that owns fields of a config, once."""
    values = flatten(config)
    modules = [importlib.import_module(f"advmoe_jax.{owner.partition(':')[0]}")
               for of_group in _OWNERS.values() for owner in of_group]
    modules += [_module(of, name, values[name]) for name, of in table(values).items() if of.room]
    yield from dict.fromkeys(modules)


def load(text: str) -> Any:
    """Runs a config file.

    Args:
        text: "configs/digits_r18.py", or with an argument "configs/digits_r18.py:at_dense".
    Returns:
        What its `get_config` gives, a ConfigDict with all fields, whose `name` is the file's name, with the argument
        behind an underscore; or what its `get_recipe` gives.
    Raises:
        UserError: there is no such file, it fails, or it sets a field that does not exist or to what it cannot be.
    """
    path, _, argument = text.partition(":")
    if not Path(path).is_file():
        near = sorted(str(p) for p in Path(path).parent.glob("*.py")) if Path(path).parent.is_dir() else ()
        raise unknown_name("config file", path, near) if near else UserError(
            f"no config file {path}: expected a path such as configs/digits_r18.py")
    folder = str(Path(path).parent)
    with blamed(path):
        try:
            sys.path.insert(0, folder)  # a recipe may import the config beside it
            content = runpy.run_path(path)
            maker = next((name for name in ("get_recipe", "get_config") if callable(content.get(name))), None)
            if maker is None:
                raise UserError(f"config file {path} has no get_config: expected a function that returns a ConfigDict, "
                                "from default()")
            made = content[maker](*[argument] if argument else [])
        finally:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)
        if isinstance(made, ConfigDict):
            return finished(made, path, argument)
    if maker == "get_config":
        raise UserError(f"get_config of {path} returns {type(made).__name__}: expected a ConfigDict, from default()")
    return made


@contextlib.contextmanager
def blamed(path: str) -> Iterator[None]:
    """Makes one line, with that of the file, of whatever a config file and what it returned raise."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"{path}, line {lines[-1]}," if lines else path
        raise UserError(f"config file {where} fails: {type(error).__name__}: {_said(error)}") from None


def finished(config: ConfigDict, path: str, argument: str, run: str = "") -> ConfigDict:
    """What a file returned with all fields, each checked, and the file, argument and run that give it its name."""
    try:
        config = complete(config)
        _check_values(flatten(config))
    except UserError as error:
        raise UserError(f"config file {path}: {run and f'run {run}: '}{error}") from None
    config.file, config.argument, config.run = path, argument, run
    config.name = "/".join(filter(None, ("_".join(filter(None, (Path(path).stem, argument))), run)))
    return config


def _said(error: BaseException) -> str:
    """What an exception says, in one line. Of a name that does not exist ml_collections says all that do."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    try:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    except Exception:  # of a class of the file
        return "it cannot say what"
    return " ".join(re.sub(r" Other fields present: .*\}\"", "", text, flags=re.DOTALL).split())[:300]


def complete(config: ConfigDict) -> ConfigDict:
    """A config with exactly the fields that its names ask for.

    Fields of a module that is not named are dropped where they have that module's default.

    Raises:
        UserError: a field is unknown, or belongs to a module that is not named and is not at its default.
    """
    values = flatten(config)
    wanted = table(values)
    for name in values.keys() - wanted.keys():
        _drop(name, values[name], wanted)
    return _nested({name: values.get(name, of.default) for name, of in wanted.items()})


def _drop(name: str, value: Any, wanted: Mapping[str, Setting]) -> None:
    """Raises UserError unless a field that is not wanted is another module's, at its default."""
    elsewhere = list(_elsewhere(name, wanted))
    if not any(of.default == value for *_, of in elsewhere):
        raise _unknown_field(name, wanted)


def _elsewhere(name: str, wanted: Mapping[str, Setting]) -> Iterator[tuple[str, str, Setting]]:
    """(field that names a module, module, setting) of the modules that are not named and have a field of this name."""
    group = name.partition(".")[0]
    for chooser, of in wanted.items():
        if of.room and chooser.startswith(f"{group}."):
            for module in find.names(*of.room):
                try:
                    own = getattr(find.module(of.room[0], module, defines=of.room[1:]), "Config", None)
                    other = fields.settings(own, f"{group}.").get(name) if own else None
                except UserError:  # it is not this module that was asked for
                    continue
                if other is not None:
                    yield chooser, module, other


def choose(config: ConfigDict, **names: str) -> None:
    """Names modules in place, {group: name}; the fields of the groups become theirs. Errors as `complete`."""
    _name(config, {f"{group}.name": name for group, name in names.items()})


def _name(config: ConfigDict, names: Mapping[str, str]) -> None:
    """Sets fields that name modules. What is at a default follows to that of the new module."""
    values = flatten(config)
    before = table(values)
    set_by_hand = {name: value for name, value in values.items()
                   if name not in before or before[name].room or value != before[name].default}
    by = complete(_nested(set_by_hand | names))
    with config.unlocked():
        for group in list(config):
            del config[group]
        config.update(by)
    config.lock()


def override(config: ConfigDict, text: str) -> None:
    """Sets a field in place.

    Args:
        config: what to change.
        text: "model.width=32"; the value is read as the type that the field has.
    Raises:
        UserError: no such field, or a value of another type.
    """
    name, equals, value = text.partition("=")
    wanted = table(flatten(config))
    if name not in wanted:
        raise _unknown_field(name, wanted)
    if not equals:
        raise UserError(f"--config.{name} has no value: expected --config.{name}={flatten(config)[name]}")
    parsed = _parse(name, value, type(wanted[name].default))
    if wanted[name].room:
        _name(config, {name: parsed})
    else:
        config.update_from_flattened_dict({name: parsed})


def override_all(config: ConfigDict, texts: list[str]) -> None:
    """`override` by each of several texts, those that name modules first, of which one may bring another."""
    left = list(texts)

    def chooser():
        wanted = table(flatten(config))
        return next((text for text in left if getattr(wanted.get(text.partition("=")[0]), "room", None)), None)

    while text := chooser():
        override(config, text)
        left.remove(text)
    for text in left:
        override(config, text)


def _unknown_field(name: str, known: Mapping[str, Setting]) -> UserError:
    ways = [f"{chooser}={module}" for chooser, module, _ in _elsewhere(name, known)]
    if ways:
        chooser, those = ways[0].partition("=")[0], "one of these" if len(ways) > 1 else ways[0]
        return UserError(f"{name} is a field of {', '.join(ways)}, and {chooser} is {known[chooser].default}: "
                         f"expected no such field, or {those}")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    group = name.rpartition(".")[0]
    siblings = [field for field in known if field.rpartition(".")[0] == group]
    hint = f"; did you mean {near[0]}?" if near else ""
    groups = dict.fromkeys(field.partition(".")[0] for field in known)
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
        raise UserError(f"config field {name} is {value!r}: expected {fields.WORDS[kind]}") from None


def check(config: ConfigDict) -> None:
    """Raises UserError for everything that can be refused without building anything: a value out of its range, a field
    that would have no effect, values that do not fit together."""
    values = flatten(config)
    wanted = _check_values(values)
    for module in owners(config):
        if hasattr(module, "check"):
            module.check(config)
    fields.check_effects(wanted, values, config)


def checked(config: ConfigDict, overrides: list[str], where: str = "") -> ConfigDict:
    """The config, changed in place by `override_all` and checked. `where` stands in front of what a UserError says."""
    try:
        override_all(config, overrides)
        check(config)
    except UserError as error:
        raise type(error)(f"{where}{error}") from None
    return config


def _check_values(values: Mapping[str, Any]) -> dict[str, Setting]:
    """The table of a whole config, once each of its values is of the right type and in range."""
    wanted = table(values)
    for name, of in wanted.items():
        if not of.room:
            of.check(name, values[name])
    return wanted


def describe(config: ConfigDict) -> Iterator[tuple[str, Any, str, str]]:
    """(field, value, what it takes, one line on it) of every field."""
    values = flatten(config)
    for name, of in table(values).items():
        expected = ", ".join(find.names(*of.room)) if of.room else of.expected
        yield name, values[name], expected, of.what + (f"; for {of.only.when}" if of.only else "")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"model.width": 64, ...}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{k}": v for k, v in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def _nested(values: Mapping[str, Any]) -> ConfigDict:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return _locked(tree)


def _locked(tree: Mapping[str, Any]) -> ConfigDict:
    return _Fields({name: _locked(value) if isinstance(value, dict) else value for name, value in tree.items()}).lock()


def differences(ours: ConfigDict, theirs: ConfigDict) -> list[str]:
    """Fields that make two configs two experiments, as "model.width 64 (was 16)"."""
    a, b = flatten(ours), flatten(theirs)
    return [f"{name} {a.get(name)!r} (was {b.get(name)!r})" for name in sorted(a | b)
            if not name.startswith(_FREE) and a.get(name) != b.get(name)]


def to_json(config: ConfigDict) -> dict[str, Any]:
    """What is stored of a config."""
    return {"version": _VERSION} | config.to_dict()


def write(config: ConfigDict, path: epath.Path) -> None:
    """Writes it as JSON."""
    write_json(path, to_json(config))


def read(path: epath.Path) -> ConfigDict:
    """Reads what `write` wrote; fields that have come since have their defaults."""
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no config of this version: {_said(error)}") from None
    return from_json(stored, path)


def from_json(stored: dict[str, Any], where: epath.Path) -> ConfigDict:
    """The config of which `to_json` gave this, found in the file `where`."""
    try:
        version = stored.get("version", 1)
        if version == _VERSION:
            return complete(ConfigDict({name: value for name, value in stored.items() if name != "version"}))
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is no config of this version: {_said(error)}") from None
    raise UserError(f"{where} is of version {shown(version)}, expected {_VERSION}: runs of older versions of "
                    "advmoe_jax are evaluated with those")
