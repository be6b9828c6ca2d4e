"""Safetensors files: tensors by name, and text about them. Nothing in such a file can be run."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from advmoe_jax.core.errors import UserError
from advmoe_jax.core.files import write_bytes


def write(path: epath.PathLike, tensors: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Writes tensors, whole or not at all.

    Args:
        path: of the file.
        tensors: {name: array}.
        about: {name: text}, kept in the file's header.
    """
    whole = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    write_bytes(path, _library(path).save(whole, dict(about)))


def read(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    library = _library(path)
    with _blamed(path):
        return library.load(epath.Path(path).read_bytes())


def about(path: epath.PathLike) -> dict[str, str]:
    """The text in the header of a file. Errors as `read`."""
    with _blamed(path), epath.Path(path).open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})


@contextlib.contextmanager
def _blamed(path: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"no file {path}: expected a safetensors file") from None
    except Exception as error:  # safetensors raises its own, and what numpy or its parser raised
        raise UserError(f"{path} cannot be read ({type(error).__name__}): expected a safetensors file, all of it"
                        ) from None


def _library(path: epath.PathLike) -> ModuleType:
    try:
        from safetensors import numpy as library
    except ImportError:
        raise UserError(f"{path} needs safetensors: run `pip install 'advmoe_jax[export]'`") from None
    return library
