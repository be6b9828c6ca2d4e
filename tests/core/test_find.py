"""Modules that a name in a config stands for."""

import sys

import pytest

from advmoe_jax.core import find
from advmoe_jax.core.errors import UserError


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package advmoe_jax.animals of three modules, one of which cannot be imported and two of which define `make`."""
    import advmoe_jax

    folder = tmp_path / "animals"
    folder.mkdir()
    (folder / "heron.py").write_text("'''A bird.'''\n\n\ndef make():\n    return 'heron'\n")
    (folder / "stork.py").write_text("import no_such_library\n\n\nclass make:\n    pass\n")
    (folder / "shared.py").write_text(
        "import os\n\n\ndef helper():\n    def make():\n        pass\n\n\nmade = 'def make('\n")
    monkeypatch.setattr(advmoe_jax, "__path__", [*advmoe_jax.__path__, str(tmp_path)])
    yield
    for name in [name for name in sys.modules if name.startswith("advmoe_jax.animals")]:
        del sys.modules[name]


def test_names_are_of_modules_that_define_it(room):
    assert find.names("animals", "make") == ("heron", "stork")
    assert find.names("animals", "helper") == ("shared",)


def test_module(room):
    assert find.module("animals", "heron", "make").make() == "heron"
    with pytest.raises(UserError, match="^unknown animal 'herom': expected one of heron, stork; did you mean 'heron'"):
        find.module("animals", "herom", "make")
    for defines, words in (("make", "make"), (("make", "model"), "make or model")):
        with pytest.raises(UserError, match=f"^unknown bird 'shared': expected .*shared.py to define {words}$"):
            find.module("animals", "shared", defines, kind="bird")
    with pytest.raises(UserError, match="^advmoe_jax/animals/stork.py cannot be imported: ModuleNotFoundError: No "):
        find.module("animals", "stork", "make")
