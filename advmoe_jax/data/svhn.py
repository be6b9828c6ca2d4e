"""SVHN, cropped: 73,257 training and 26,032 test images of house numbers, 32x32 RGB, 10 digits.

Netzer et al., 2011. The `extra` set is not used.
"""

import io

import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import raw
from advmoe_jax.data.source import Dataset, Known, read_prepared

_SITE = "http://ufldl.stanford.edu/housenumbers"


def decode_mat(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Reads a MATLAB file with `X` (32, 32, 3, n) uint8 and `y` (n, 1) in 1..10; 10 is the digit 0.

    Returns:
        images (n, 32, 32, 3) uint8, labels (n,) int32 in 0..9.
    """
    from scipy import io as scipy_io  # slow to import, and only preparing needs it
    content = scipy_io.loadmat(io.BytesIO(data), variable_names=["X", "y"])
    images, labels = content["X"], content["y"].ravel().astype(np.int32)
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise UserError(f"X is {images.dtype} {images.shape}, "
                        f"expected uint8 (32, 32, 3, {len(labels)})")
    return images.transpose(3, 0, 1, 2), np.where(labels == 10, 0, labels)


OFFICIAL = raw.Official(
    name="svhn",
    class_names=tuple("0123456789"),
    urls=(f"{_SITE}/train_32x32.mat", f"{_SITE}/test_32x32.mat"),
    archives={},
    layouts=(
        raw.Layout(
            folder="",
            train={"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373"},
            test={"test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
            decode=decode_mat,
        ),
    ),
)
KNOWN = Known(len(OFFICIAL.class_names), (32, 32, 3))


def dataset(root: str, variant: str = "") -> Dataset:
    """Reads ROOT/svhn/, which `python -m advmoe_jax.data.prepare svhn` writes."""
    return read_prepared("svhn", root, variant)
