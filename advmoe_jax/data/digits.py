"""Handwritten digits that scikit-learn carries: 1,797 images, 8x8 grey. Needs no download.

The UCI optical recognition of handwritten digits test set (Alpaydin and Kaynak, 1998).
"""

import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.data.source import Dataset, Known, in_memory, refuse_variant
from advmoe_jax.data.split import stratified

KNOWN = Known(10, (8, 8, 1))
_NUM_TEST = 500


def dataset(root: str, variant: str = "") -> Dataset:
    """Returns 1,297 training and 500 test images of shape (8, 8, 1), a fixed stratified split.

    Args:
        root: not used.
        variant: must be empty.
    Raises:
        UserError: scikit-learn is not installed.
    """
    del root
    refuse_variant("digits", variant)
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError("data.name 'digits' needs scikit-learn: "
                        "run `pip install advmoe_jax[quickstart]`") from None
    bunch = datasets.load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    test = stratified(labels, _NUM_TEST)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return in_memory("digits", {"train": (images[train], labels[train]), "test": (images[test], labels[test])},
                     class_names=tuple("0123456789"))


def how_to_prepare(root: str, variant: str = "") -> str:
    """What to tell a person who wants to prepare this source."""
    del root
    refuse_variant("digits", variant)
    return "digits needs no preparation: scikit-learn carries it; use data.name=digits as it is"
