"""Checkpoint files of PyTorch: the weights, and what says how they are used.

Nothing in a file is run. Of the types that people keep beside weights, those in `_HARMLESS` are skipped; a file that
asks for any other is refused. A model that normalises its images holds the mean and the standard deviation as tensors
called "normalize.mean", "mu", "normalizer.new_std" and so on: images (x - mean) / std are what its weights expect.

C channels.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_jax.core import tensor_files
from advmoe_jax.core.errors import UserError
from advmoe_jax.models import normalisation

_WRAPPERS = ("state_dict", "net", "model", "model_state_dict", "model_state", "state_dict_ema")
_DEEPEST = 4
_PREFIXES = ("module.", "_orig_mod.", "model.", "1.")
_NORMALISATION = {"mean": "mean", "mu": "mean", "new_mean": "mean", "std": "std", "sigma": "std", "new_std": "std"}
NORMALISED_BY = "normalize.mean", "normalize.std"
"""Entries of a safetensors file's header: how images are normalised before the model, "" for not at all."""
_HARMLESS = ("argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath", "numpy.ndarray", "numpy.dtype",
             *(f"numpy.{room}.multiarray.{name}" for room in ("core", "_core") for name in ("scalar", "_reconstruct")),
             *sorted({f"numpy.{np.dtype(code).type.__name__}" for code in np.typecodes["All"]}))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        weights: {PyTorch name: array} of the model.
        router: {PyTorch name: array} of a router that is kept beside the model, {} if there is none.
        mean, std: (C,) float32, how the model normalises images in [0, 1]; None if it does not.
        ignored: the names of what else stands beside the weights ("epoch").
    """

    weights: dict[str, np.ndarray]
    router: dict[str, np.ndarray]
    mean: np.ndarray | None
    std: np.ndarray | None
    ignored: tuple[str, ...]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint file.

    A state dict below "state_dict", "net", "model" and the like is unwrapped, and prefixes that all names share, such
    as DataParallel's "module." and torch.compile's "_orig_mod.", are stripped.

    Args:
        path: what `torch.save` wrote (.th, .pth, .pt), which needs PyTorch here too, or an .npz or a .safetensors,
            which do not.
    Raises:
        UserError: there is no such file, it cannot be read, it holds no state dict, or a tensor of it is not dense.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint file {path}: expected a PyTorch checkpoint, a .safetensors or an .npz")
    content = {".npz": _read_npz, ".safetensors": _read_safetensors}.get(path.suffix, _read_torch)(path)
    router, ignored = {}, []
    for _ in range(_DEEPEST):
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            break
        beside = {name: value for name, value in content.items() if name != wrapper}
        if isinstance(beside.get("router"), Mapping):
            router = beside.pop("router")
        ignored += map(str, beside)
        content = content[wrapper]
    else:
        raise UserError(f"{path} nests {wrapper!r} more than {_DEEPEST} times: expected a state dict, alone or under "
                        f"{', '.join(_WRAPPERS)}")
    weights, router = _tensors(path, content), _tensors(path, router) if router else {}
    mean, std = _normalisation(path, weights)
    return Checkpoint(_stripped(weights), _stripped(router), mean, std, tuple(ignored))


def _tensors(path: Path, content: Mapping[Any, Any]) -> dict[str, np.ndarray]:
    other = [name for name, value in content.items() if not (isinstance(name, str) and hasattr(value, "shape"))]
    if other or not content:
        found = f"has an entry {other[0]!r} that is no named tensor" if other else "is empty"
        raise UserError(f"{path} {found}: expected a state dict, alone or under {', '.join(_WRAPPERS)}")
    return {name: _to_numpy(path, name, value) for name, value in content.items()}


def _normalisation(path: Path, weights: dict[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Takes the mean and the standard deviation out of `weights`; there may be copies of them."""
    kinds = {name: _NORMALISATION.get(name.rpartition(".")[2]) for name in weights}
    found = [(kind, weights.pop(name).astype(np.float32).ravel()) for name, kind in kinds.items() if kind]
    if not found:
        return None, None
    of_kind = dict(found)
    mean, std = (of_kind.get(kind, np.zeros(0)) for kind in ("mean", "std"))
    if not (all(np.array_equal(array, of_kind[kind]) for kind, array in found)
            and mean.shape == std.shape and np.isfinite([mean, std]).all() and (std > 0).all()):
        names = ", ".join(name for name, kind in kinds.items() if kind)
        raise UserError(f"{path} normalises images by {names}: expected one finite mean and one positive standard "
                        "deviation of each channel")
    return mean, std


def _stripped(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    while weights and (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in weights)), None)):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # numpy raises what zipfile or its parser raised
        raise UserError(f"{path} cannot be read as a checkpoint: expected an .npz of plain arrays, all of it") from None


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors, and the normalisation that our own exports name beside them, as tensors too."""
    said = tensor_files.about(path)
    texts = {name: said[name] for name in NORMALISED_BY if name in said}
    return tensor_files.read(path) | {name: np.float32(normalisation.means(text, name)) for name, text in texts.items()}


class _Skipped:
    """Stands for a value of a harmless type."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _read_torch(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise UserError(f"reading {path} needs PyTorch: run `pip install advmoe_jax[torch]`, "
                        "or save its state dict as .npz") from None
    try:
        with torch.serialization.safe_globals([(_Skipped, name) for name in _HARMLESS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what pickle, zipfile or its storage raised, and advises unsafe loading
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(f"{path} asks for {asked[1]}, which weights do not need and which could run code; nothing "
                            "was loaded: expected tensors, numbers and text; save the state dict alone") from None
        raise UserError(f"{path} cannot be read as a checkpoint: expected what torch.save writes, all of it") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}: expected a state dict")
    return content


def _to_numpy(path: Path, name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    try:
        value = value.detach()
        return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()
    except Exception:  # what torch raises depends on the kind of tensor
        raise UserError(f"tensor {name} of {path} is {value.layout}, {value.dtype}, on {value.device}: expected a "
                        "dense one of plain numbers") from None
