"""The contract of splits, for every data source and for what is made of splits."""

import dataclasses
import functools

import numpy as np
import pytest

from advmoe_jax.core import find
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import images, pipeline, prepare, source, split
from advmoe_jax.data.split import Arrays, Rows

SOURCES = find.names("data", "dataset")


@pytest.fixture(scope="module")
def dataset(request, tmp_path_factory):
    """Data of a source; of official files, random images stand in for the real ones."""
    name, view, folder = request.param, None, str(tmp_path_factory.mktemp(request.param))
    module = find.module("data", name, "dataset")
    if hasattr(module, "OFFICIAL"):
        rng, classes = np.random.default_rng(0), module.OFFICIAL.class_names
        arrays = {part: (rng.integers(0, 256, (9, 32, 32, 3), np.uint8), rng.integers(0, len(classes), 9, np.int32))
                  for part in source.SPLITS}
        source.write_prepared(source.in_memory(name, arrays, classes), folder)
    if hasattr(module, "raw_images"):
        pytest.importorskip("array_record")
        import pictures  # beside this file
        raw = tmp_path_factory.mktemp("raw") / "set"
        (pictures.tiny_imagenet if name == "tiny_imagenet" else pictures.tree)(raw)
        name = "imagefolder:small" if name == "imagefolder" else name
        view = dataclasses.asdict(images.Config(image_size=16, resize=18))
        prepare.prepare(name, folder, str(raw), allow_unknown_hash=True)
    if name == "tfds":
        pytest.importorskip("tensorflow_datasets")
        pytest.importorskip("array_record")
        import test_tfds  # beside this file
        test_tfds.prepare(folder, "tiny_set")
        name = "tfds:tiny_set"
    if name == "digits":
        pytest.importorskip("sklearn")
    return functools.partial(pipeline.open_dataset, name, folder, view=view)


@pytest.mark.parametrize("subset", [0, 4])
@pytest.mark.parametrize("part", source.SPLITS)
@pytest.mark.parametrize("dataset", SOURCES, indirect=True)
def test_contract(dataset, part, subset):
    check(dataset(subset).split(part))


def test_contract_of_a_part_of_a_part():
    rng = np.random.default_rng(0)
    whole = Arrays(rng.integers(0, 256, (30, 4, 5, 3), np.uint8), rng.integers(0, 7, 30, np.int32))
    part = Rows(Rows(whole, np.arange(0, 30, 2)), np.array([14, 3, 3, 0, 8]))
    check(part)
    np.testing.assert_array_equal(part.labels, whole.labels[[28, 6, 6, 0, 16]])
    np.testing.assert_array_equal(part.take(np.arange(5))["image"], whole.images[[28, 6, 6, 0, 16]])


def check(a_split):
    """What everything that reads a split relies on."""
    n, labels, shape = len(a_split), a_split.labels, a_split.image_shape
    assert n >= 4 and isinstance(labels, np.ndarray) and labels.dtype == np.int32 and labels.shape == (n,)
    assert isinstance(shape, tuple) and len(shape) == 3 and all(isinstance(size, int) for size in shape)
    whole = a_split.take(np.arange(n))
    assert len(np.unique(whole["image"].reshape(n, -1), axis=0)) > 1, "its images are all the same: no test"
    for rows in (np.array([n - 1, 0, 2, 2, 1, 0]), np.array([3]), np.arange(n)[::-1]):
        batch = a_split.take(rows.astype(np.int64))
        assert batch.keys() == {"image", "label"}
        assert batch["image"].dtype == np.uint8 and batch["image"].shape == (len(rows), *shape)
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"], labels[rows])
        np.testing.assert_array_equal(batch["image"], whole["image"][rows])
    batch["image"][:] = 0  # a caller's to change
    np.testing.assert_array_equal(a_split.take(np.arange(n))["image"], whole["image"])
    with pytest.raises(IndexError):
        a_split.take(np.array([0, n]))
    assert split.fingerprint(a_split) == split.fingerprint(Arrays(whole["image"], whole["label"]))


def test_fingerprint_of_rows_is_that_of_their_arrays(monkeypatch):
    rng = np.random.default_rng(0)
    whole = Arrays(rng.integers(0, 256, (30, 4, 4, 3), np.uint8), rng.integers(0, 7, 30, np.int32))
    rows = np.array([3, 29, 29, 0, 11])
    alone = split.fingerprint(Arrays(whole.images[rows], whole.labels[rows]))
    assert split.fingerprint(whole, rows) == alone != split.fingerprint(whole)
    monkeypatch.setattr(split, "_CHUNK", 2)
    assert split.fingerprint(whole, rows) == alone


@pytest.mark.parametrize("images, labels, message", [
    (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int32), "a split: images are float32 .*expected uint8"),
    (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64), "a split: labels are int64 .2,., expected int32"),
    (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32), "labels are int32 .3,., expected int32 .2,."),
])
def test_arrays_that_do_not_belong_together(images, labels, message):
    with pytest.raises(UserError, match=message):
        Arrays(images, labels)
