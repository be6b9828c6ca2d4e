"""Who may import whom, and what importing the program starts."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys

import pytest

import advmoe_jax

ROOT = pathlib.Path(advmoe_jax.__file__).parent
FLOORS = {"core": 0, "ops": 1, "models": 2, "attacks": 2, "pruning": 2, "data": 2, "train": 3, "evaluation": 3,
          "systems": 4, "report": 4, "interop": 4, "bench": 5, "run": 5, "recipes": 6, "modes": 7, "main": 8,
          "_version": 0, "__init__": 0, "__version__": 0}
MODULES = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py"))


def _room(name):
    """The package below advmoe_jax, or the module at its top, that a dotted name is in."""
    return name.split(".")[1] if "." in name else "__init__"


def _imports(path, of="advmoe_jax"):
    """Dotted names of what a file imports from a package, inside functions too; of="" from all."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            names |= ({f"{node.module}.{alias.name}" for alias in node.names} if node.module == "advmoe_jax"
                      else {node.module})
    return {name for name in names if of in ("", name.split(".")[0])}


def _breaches(file, imports):
    own = _room("advmoe_jax." + file.removesuffix(".py").replace("/", "."))
    if own == "__init__":  # imported with every other module
        return [name for name in imports if FLOORS.get(_room(name)) != 0]
    return [name for name in imports if (room := _room(name)) != own
            and FLOORS.get(room, 9) >= FLOORS[own]]


def test_every_package_has_a_floor():
    rooms = {_room("advmoe_jax." + file.removesuffix(".py").replace("/", ".")) for file in MODULES} - {"__init__"}
    assert rooms <= FLOORS.keys()
    assert len(MODULES) > 40


@pytest.mark.parametrize("file", MODULES)
def test_imports_lower_floors_only(file):
    assert not _breaches(file, _imports(ROOT / file))


@pytest.mark.parametrize("file, name, allowed", [
    ("attacks/pgd.py", "advmoe_jax.ops.balls", True), ("attacks/pgd.py", "advmoe_jax.attacks.driver", True),
    ("attacks/pgd.py", "advmoe_jax.models.network", False), ("core/rng.py", "advmoe_jax.ops.balls", False),
    ("train/loop.py", "advmoe_jax.systems.advmoe", False), ("systems/advmoe.py", "advmoe_jax.report.runs", False),
    ("modes.py", "advmoe_jax.report.runs", True), ("report/runs.py", "advmoe_jax.modes", False),
    ("evaluation/measure.py", "advmoe_jax.train.loop", False), ("run.py", "advmoe_jax.modes", False),
    ("main.py", "advmoe_jax.modes", True), ("__init__.py", "advmoe_jax.ops.balls", False)])
def test_the_rule_itself(file, name, allowed):
    assert not _breaches(file, {name}) == allowed


def test_what_is_imported_is_required_and_what_is_required_imported():
    required = configparser.ConfigParser()
    required.read(ROOT.parent / "setup.cfg")
    extras = dict(required["options.extras_require"])
    packages, optional = ({re.split(r"[\[<>=]", line)[0].replace("-", "_") for line in text.split()} for text in (
        required["options"]["install_requires"],
        " ".join(extras[name] for name in ("export", "images", "onnx", "quickstart", "tfds", "oracle"))))
    imported = {name.split(".")[0] for file in MODULES for name in _imports(ROOT / file, of="")}
    packages_of = {"sklearn": "scikit_learn", "PIL": "pillow", "absl": "absl_py", "orbax": "orbax_checkpoint",
                   "yaml": "pyyaml"}
    imported = {packages_of.get(name, name) for name in imported}
    assert packages <= imported
    by_hand = {"torchattacks"}  # its own requirements would downgrade others
    assert imported - sys.stdlib_module_names - {"advmoe_jax"} <= packages | optional | by_hand


@pytest.mark.parametrize("module", ["advmoe_jax.main", "advmoe_jax.modes"])
def test_importing_the_program_starts_no_backend(module):
    """And loads neither PyTorch nor TensorFlow."""
    code = f"""if True:
        import sys
        import {module}
        bridge = sys.modules.get("jax._src.xla_bridge")
        started = list(bridge._backends) if bridge else []
        loaded = [name for name in ("torch", "tensorflow", "tensorflow_datasets", "matplotlib") if name in sys.modules]
        assert not started and not loaded, (started, loaded)
        assert "{module}" != "advmoe_jax.main" or "jax" not in sys.modules, "--help is slow"
        if bridge:  # the look inside is not blind
            import jax
            jax.devices()
            assert bridge._backends
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
