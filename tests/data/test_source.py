"""The data set type and its prepared folder."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline, source
from advmoe_jax.data.split import Arrays


def _dataset(name="cifar10", num_train=6, num_test=4, seed=0):
    rng = np.random.default_rng(seed)
    train, test = (Arrays(rng.integers(0, 256, (num, 4, 4, 3), np.uint8), rng.integers(0, 3, num, np.int32))
                   for num in (num_train, num_test))
    return source.Dataset(name, train, test, class_names=("a", "b", "c"))


def _same(left, right):
    return left.class_names == right.class_names and all(
        left.fingerprint(split) == right.fingerprint(split) for split in source.SPLITS)


def test_round_trip_keeps_everything(tmp_path):
    dataset = _dataset()
    folder = source.write_prepared(dataset, tmp_path)
    back = source.read_prepared("cifar10", tmp_path)
    assert _same(dataset, back) and back.name == "cifar10"
    assert back.train.images.dtype == np.uint8 and back.train.labels.dtype == np.int32
    assert (back.image_shape, back.num_classes) == ((4, 4, 3), 3)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["counts"] == {"train": 6, "test": 4} and meta["shape"] == [4, 4, 3]
    assert os.listdir(tmp_path) == ["cifar10"]


def test_non_contiguous_arrays_have_the_same_fingerprint(tmp_path):
    dataset = _dataset()
    turned = Arrays(np.asfortranarray(dataset.train.images), dataset.train.labels)
    turned = source.Dataset("cifar10", turned, dataset.test, dataset.class_names)
    source.write_prepared(turned, tmp_path)
    assert _same(dataset, turned) and _same(dataset, source.read_prepared("cifar10", tmp_path))


@pytest.mark.parametrize("split", source.SPLITS)
@pytest.mark.parametrize("change", ["images", "labels"])
def test_fingerprint_sees_every_array(split, change):
    dataset, other = _dataset(), _dataset()
    array = getattr(other.split(split), change)
    array[0] = (array[0] + 1) % 3
    assert not _same(dataset, other)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_missing_folder_names_the_command(name, tmp_path):
    with pytest.raises(UserError) as error:
        pipeline.open_dataset(name, str(tmp_path))
    assert f"`python -m advmoe_jax.data.prepare {name} --out {tmp_path}`" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"data.dir is empty; run .*prepare {name} --out DIR"):
        pipeline.open_dataset(name, "")


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named(file, damage, tmp_path):
    path = source.write_prepared(_dataset(), tmp_path) / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 255
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:len(data) // 2])
    with pytest.raises(UserError) as error:
        source.read_prepared("cifar10", tmp_path)
    assert "prepare cifar10 --out" in str(error.value)
    assert str(path if damage != "remove" or file != "meta.json" else path.parent) in str(error.value)


def _header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("content, message", [
    (b"", "labels.npy is damaged: it holds no array"),
    (bytes(range(256)), "labels.npy is damaged: it holds no array"),
    (pickle.dumps([1]), "labels.npy is damaged: it holds no array"),
    (_header("{'descr': '<i4', 'fortran_order': False, 'shape': (4,)}\n") + bytes(15), "labels.npy is damaged"),
    (_header("{'descr': '|u1', 'fortran_order': False, 'shape': (307445734561825,)}\n"), "labels.npy is damaged"),
    (_header("{'descr': '|O', 'fortran_order': False, 'shape': (4,)}\n"), "labels.npy is damaged"),
    (_header("__import__('os').mkdir('boom')\n"), "labels.npy is damaged"),
    (_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}\n") + bytes(16), "test: labels are float32 .4,."),
    (_header("{'descr': '<i4', 'fortran_order': False, 'shape': (0,)}\n"), "labels are int32 .0,., expected int32"),
])
def test_damage_that_the_hash_agrees_with(content, message, tmp_path, monkeypatch):
    folder = source.write_prepared(_dataset(), tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder / "test_labels.npy").write_bytes(content)
    meta = json.loads((folder / "meta.json").read_text())
    meta["sha256"]["test_labels.npy"] = hashlib.sha256(content).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=message) as error:
        source.read_prepared("cifar10", tmp_path)
    line = str(error.value)
    assert str(folder) in line and f"prepare cifar10 --out {tmp_path} --force" in line
    assert "\n" not in line and "pickle" not in line and os.listdir(tmp_path) == ["cifar10"]


@pytest.mark.parametrize("text", ["[" * 100_000, "7", '{"schema": 1, "class_names": 3}', '{"schema": 1, "sha256": []}'])
def test_meta_of_something_else(text, tmp_path):
    (source.write_prepared(_dataset(), tmp_path) / "meta.json").write_text(text)
    with pytest.raises(UserError, match="meta.json is damaged; run `.*prepare cifar10 --out .* --force`"):
        source.read_prepared("cifar10", tmp_path)


def test_another_schema_is_refused(tmp_path):
    path = source.write_prepared(_dataset(), tmp_path) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(UserError, match="has layout 99, expected 1"):
        source.read_prepared("cifar10", tmp_path)


def test_writing_again_replaces(tmp_path):
    source.write_prepared(_dataset(), tmp_path)
    source.write_prepared(_dataset(seed=1), tmp_path)
    assert _same(_dataset(seed=1), source.read_prepared("cifar10", tmp_path))
    assert os.listdir(tmp_path) == ["cifar10"]


def test_failed_write_leaves_the_old_folder_alone(tmp_path, monkeypatch):
    source.write_prepared(_dataset(), tmp_path)
    save, calls = np.save, []

    def failing(path, array):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "disk full")
        save(path, array)

    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(OSError, match=f"0.0 MB were to be written: disk full: '{tmp_path}'"):
        source.write_prepared(_dataset(seed=1), tmp_path)
    assert os.listdir(tmp_path) == ["cifar10"]
    assert _same(_dataset(), source.read_prepared("cifar10", tmp_path))


def test_foreign_files_are_never_replaced(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex"):
        source.write_prepared(_dataset(), tmp_path)
    assert (tmp_path / "cifar10" / "thesis.tex").exists()


@pytest.mark.parametrize("split, field, value, message", [
    ("train", "images", np.zeros((6, 4, 4, 3), np.float32), "x train: images are float32"),
    ("train", "images", np.zeros((6, 4, 4), np.uint8), "expected uint8 .n, H, W, C."),
    ("test", "images", np.zeros((4, 5, 5, 3), np.uint8), "one size"),
    ("train", "labels", np.zeros(5, np.int32), "expected int32"),
    ("train", "labels", np.zeros(6, np.int64), "int64"),
    ("test", "labels", np.array([0, 1, 2, 3], np.int32), "expected 0..2"),
    ("test", "both", 0, "x has no test images"),
    ("test", "labels", np.array([0, 1, -1, 2], np.int32), "x: test labels are -1..2"),
])
def test_bad_arrays_are_refused(split, field, value, message):
    arrays = {name: {"images": of.images, "labels": of.labels}
              for name, of in (("train", _dataset().train), ("test", _dataset().test))}
    if field == "both":
        arrays[split] = {name: of[:value] for name, of in arrays[split].items()}
    else:
        arrays[split][field] = value
    with pytest.raises(UserError, match=message):
        source.in_memory("x", {name: tuple(of.values()) for name, of in arrays.items()}, ("a", "b", "c"))


def test_unknown_split():
    with pytest.raises(UserError, match="did you mean 'train'"):
        _dataset().fingerprint("trian")


def test_prepared_data_in_a_bucket(bucket):
    folder = source.write_prepared(_dataset(), "gs://b/data")
    assert str(folder) == "gs://b/data/cifar10"
    assert bucket.ls("b/data/cifar10", detail=False)[0] == "/b/data/cifar10/meta.json"
    assert _same(_dataset(), pipeline.open_dataset("cifar10", "gs://b/data"))
    source.write_prepared(_dataset(seed=1), "gs://b/data")
    assert _same(_dataset(seed=1), source.read_prepared("cifar10", "gs://b/data"))
    bucket.pipe("b/data/cifar10/test_labels.npy", b"x")
    with pytest.raises(UserError, match="gs://b/data/cifar10/test_labels.npy is damaged: sha256 2d711642"):
        source.read_prepared("cifar10", "gs://b/data")
    with pytest.raises(UserError, match="no prepared cifar10 in gs://b/other/cifar10"):
        source.read_prepared("cifar10", "gs://b/other")
    bucket.pipe("b/data/cifar10/thesis.tex", b"x")
    with pytest.raises(UserError, match="gs://b/data/cifar10 holds thesis.tex"):
        source.write_prepared(_dataset(), "gs://b/data")


def test_half_a_folder_in_a_bucket_is_none(bucket, monkeypatch):
    source.write_prepared(_dataset(), "gs://b/data")
    opened, written = bucket.open, []

    def failing(path, mode):
        written.append(path)
        if len(written) == 3:
            raise OSError("connection lost")
        return opened(path, mode)

    monkeypatch.setattr(bucket, "open", failing)
    with pytest.raises(OSError, match="connection lost"):
        source.write_prepared(_dataset(seed=1), "gs://b/data")
    with pytest.raises(UserError, match="no prepared cifar10 in gs://b/data/cifar10"):
        source.read_prepared("cifar10", "gs://b/data")
