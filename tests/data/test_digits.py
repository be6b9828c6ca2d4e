"""The data set that needs no download."""

import sys

import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import digits


def test_split_and_scale():
    sklearn = pytest.importorskip("sklearn.datasets")
    dataset = digits.dataset("")
    assert dataset.train.images.shape == (1_297, 8, 8, 1)
    assert dataset.test.images.shape == (500, 8, 8, 1)
    assert dataset.image_shape == (8, 8, 1) and dataset.num_classes == 10
    bunch = sklearn.load_digits()
    counts = np.bincount(bunch.target)
    assert (np.abs(np.bincount(dataset.test.labels) - 500 * counts / 1_797) < 1).all()
    assert set(np.unique(dataset.train.images)) == {int(np.rint(v * 255 / 16)) for v in range(17)}
    everything = np.concatenate([dataset.train.images, dataset.test.images]).reshape(1_797, -1)
    original = np.rint(bunch.images * 255 / 16).reshape(1_797, -1)
    assert sorted(map(tuple, everything)) == sorted(map(tuple, original))


def test_split_is_the_same_for_everyone():
    pytest.importorskip("sklearn")
    dataset = digits.dataset("/does/not/matter")
    assert dataset.fingerprint("train") == (
        "937c7c57a2f75a6e515edf1ac813dc07daf36a01cac04e5db286decac74bcd7e")
    assert dataset.fingerprint("test") == (
        "7dedefb791122d8605aa4a83395d859852d1440b09a0c657501fdd3a0aba8b82")


def test_missing_library_and_variant(monkeypatch):
    with pytest.raises(UserError, match="digits has no variant '8x8'"):
        digits.dataset("", "8x8")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"pip install advmoe_jax\[quickstart\]"):
        digits.dataset("")
