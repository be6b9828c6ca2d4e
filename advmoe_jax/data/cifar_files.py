"""What CIFAR-10 and CIFAR-100 share: their site and the two forms in which they are published (32x32 RGB).

Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Dataset layout".
"""

import codecs
import functools
import io
import pickle
from collections.abc import Mapping

import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.data.raw import Layout

SITE = "https://www.cs.toronto.edu/~kriz"

_PIXELS = 3 * 32 * 32
_RECONSTRUCT = np.empty(0).__reduce__()[0]
# All that a pickle of arrays, bytes and containers names; anything else could run code.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


def binary(folder: str, train: Mapping[str, str], test: Mapping[str, str], label_bytes: int) -> Layout:
    """The binary form; see `raw.Layout` and `decode_binary`."""
    return Layout(folder, train, test, functools.partial(decode_binary, label_bytes=label_bytes))


def pickled(folder: str, train: Mapping[str, str], test: Mapping[str, str], label_key: str) -> Layout:
    """The Python form; see `raw.Layout` and `decode_pickle`."""
    return Layout(folder, train, test, functools.partial(decode_pickle, label_key=label_key))


def decode_binary(data: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads records: `label_bytes` labels (the last counts), then 3,072 pixels, red plane first.

    Returns:
        images (n, 32, 32, 3) uint8, labels (n,) uint8.
    """
    size = label_bytes + _PIXELS
    if not data or len(data) % size:
        raise UserError(f"{len(data)} bytes, expected a multiple of {size}")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return _images(records[:, label_bytes:]), records[:, label_bytes - 1]


def decode_pickle(data: bytes, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a pickled dictionary with `data` (n, 3072) uint8 and the labels under `label_key`.

    Only arrays, bytes, text, numbers and containers are loaded; nothing in the file can run.

    Returns:
        images (n, 32, 32, 3) uint8, labels (n,) int64.
    """
    batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    if lacks := [key for key in ("data", label_key) if key not in batch]:
        raise UserError(f"it has no {lacks[0]!r}, only {', '.join(map(repr, batch))}")
    pixels, labels = np.asarray(batch["data"]), np.asarray(batch[label_key], np.int64)
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise UserError(f"data is {pixels.dtype} {pixels.shape}, "
                        f"expected uint8 ({len(labels)}, {_PIXELS})")
    return _images(pixels), labels


def _images(pixels):
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


class _Unpickler(pickle.Unpickler):

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise UserError(f"it asks for {f'{module}.{name}'!r}, which no official file does")
        return _ALLOWED[module, name]
