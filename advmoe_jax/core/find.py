"""A name in a config is a module name: nothing is registered, a new file is enough."""

import functools
import importlib
import importlib.util
import pathlib
from types import ModuleType

from advmoe_jax.core.errors import UserError, unknown_name


def names(package: str, *defines: str) -> tuple[str, ...]:
    """Names of the modules of `advmoe_jax.<package>` that define one of `defines` (a function, class or constant).

    The source is searched, not imported, so that optional libraries are not needed to list names.
    """
    return tuple(sorted(file.stem for file in _folder(package).glob("*.py") if _defines(file, defines)))


def _folder(package: str) -> pathlib.Path:
    return pathlib.Path(importlib.import_module(f"advmoe_jax.{package}").__path__[0])


def _defines(file: pathlib.Path, defines: tuple[str, ...]) -> bool:
    return _has(file, file.stat().st_mtime_ns, defines)


@functools.cache
def _has(file: pathlib.Path, changed: int, defines: tuple[str, ...]) -> bool:
    """Of a file as it was when last changed; a config asks for names hundreds of times."""
    text = file.read_text()
    return any(f"\n{start}" in text for name in defines for start in (
        f"def {name}(", f"class {name}(", f"class {name}:", f"{name} = "))


def module(package: str, name: str, defines: str | tuple[str, ...], kind: str | None = None) -> ModuleType:
    """Imports `advmoe_jax.<package>.<name>`.

    Args:
        package: a room of the package ("attacks", "data").
        name: the module's name as a config gives it.
        defines: the attribute that such a module must have, or several of which it must have one.
        kind: what to call it in an error; `package` without its plural s unless given.
    Raises:
        UserError: no such module, with the nearest names; or it lacks what it must define, or cannot be imported.
    """
    kind = kind or package.removesuffix("s")
    wanted = (defines,) if isinstance(defines, str) else tuple(defines)
    file, path = f"advmoe_jax/{package}/{name}.py", _folder(package) / f"{name}.py"
    if not (name.isidentifier() and path.is_file() and _defines(path, wanted)):
        if name.isidentifier() and importlib.util.find_spec(f"advmoe_jax.{package}.{name}") is not None:
            raise UserError(f"unknown {kind} {name!r}: expected {file} to define {' or '.join(wanted)}")
        raise unknown_name(kind, name, names(package, *wanted))
    try:
        return importlib.import_module(f"advmoe_jax.{package}.{name}")
    except (ImportError, SyntaxError) as error:
        raise UserError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
