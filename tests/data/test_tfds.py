"""Sets that tensorflow-datasets prepared, read without TensorFlow."""

import shutil
import sys

import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline

library = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


def prepare(folder, name, splits=("train", "test"), shape=(4, 4, 3), sizes=(4,), dtype=np.uint8,
            feature="image", num_images=5, shards=1, hidden=()):
    """Prepares `folder`/NAME with images that hold their own number; labels of `hidden` splits are -1."""
    features = library.features

    class Imitation(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version("1.0.0")

        def _info(self):
            return library.core.DatasetInfo(builder=self, features=features.FeaturesDict({
                feature: features.Tensor(shape=shape, dtype=dtype),
                "label": features.ClassLabel(names=["even", "odd"])}))

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(split in hidden) for split in splits}

        def _generate_examples(self, is_hidden):
            for i in range(num_images):
                size = sizes[i % len(sizes)]
                yield i, {feature: np.full((size, 4, 3), i, dtype), "label": -1 if is_hidden else i % 2}

    Imitation.name = name
    Imitation(data_dir=str(folder), file_format="array_record").download_and_prepare(
        download_config=library.download.DownloadConfig(num_shards=shards))
    return str(folder)


def test_reads_a_prepared_set_in_record_order(tmp_path, capfd):
    root = prepare(tmp_path, "tiny_set", shards=2)
    capfd.readouterr()
    for name in ("tfds:tiny_set", "tfds:tiny_set:1.0.0"):
        dataset = pipeline.open_dataset(name, root)
        assert dataset.name == name and dataset.class_names == ("even", "odd")
        assert dataset.train.images.shape == (5, 4, 4, 3) and dataset.train.images.dtype == np.uint8
        assert sorted(dataset.train.images[:, 0, 0, 0]) == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(dataset.train.images[:, 0, 0, 0] % 2, dataset.train.labels)
    records = library.builder("tiny_set", data_dir=root).as_data_source(split="train")
    np.testing.assert_array_equal([record["image"] for record in records], dataset.train.images)
    np.testing.assert_array_equal([record["label"] for record in records], dataset.train.labels)
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr().err == ""


def test_validation_stands_in_for_test(tmp_path):
    root = prepare(tmp_path, "with_validation", splits=("train", "validation"))
    assert len(pipeline.open_dataset("tfds:with_validation", root).test) == 5


def test_validation_stands_in_for_a_test_split_with_hidden_labels(tmp_path, capsys):
    root = prepare(tmp_path, "hides", splits=("train", "validation", "test"), hidden=("test",))
    assert pipeline.open_dataset("tfds:hides", root).test.labels.min() == 0
    assert "warning: tfds:hides hides the labels of 'test': 'validation' stands in" in capsys.readouterr().err


def _damage(path, content):
    """Removes a file (None), cuts it ("half") or writes other bytes."""
    data = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(data[:len(data) // 2] if content == "half" else content)


def test_damaged_files_are_named(tmp_path):
    whole = prepare(tmp_path / "whole", "tiny_set", shards=2)
    for number, (file, content, message) in enumerate([
            ("tiny_set-train.array_record-00001-of-00002", None, "train.array_record-00001-of-00002 is missing"),
            ("tiny_set-train.array_record-00001-of-00002", "half", "train.array_record-00001-of-00002 is damaged"),
            ("tiny_set-test.array_record-00000-of-00002", b"", "test.array_record-00000-of-00002 is damaged"),
            ("dataset_info.json", b"{", "tfds:tiny_set in .* cannot be read"),
            ("dataset_info.json", b"\xff\xfe", "tfds:tiny_set in .* cannot be read"),
            ("features.json", b"[]", "tfds:tiny_set in .* cannot be read")]):
        root = shutil.copytree(whole, tmp_path / str(number))
        _damage(root / "tiny_set" / "1.0.0" / file, content)
        with pytest.raises(UserError, match=message) as error:
            pipeline.open_dataset("tfds:tiny_set", str(root))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"splits": ("train",)}, "no split 'test': it has train"),
    ({"splits": ("test",)}, "no split 'train': it has test"),
    ({"shape": (None, 4, 3), "sizes": (4, 5)}, "differ in size"),
    ({"feature": "picture"}, "no feature 'image': it has label, picture"),
    ({"dtype": np.float32}, "expected uint8"),
])
def test_unsuitable_sets(options, message, tmp_path):
    root = prepare(tmp_path, "unsuitable", **options)
    with pytest.raises(UserError, match=message):
        pipeline.open_dataset("tfds:unsuitable", root)


@pytest.mark.parametrize("name, message", [
    ("tfds:cifar10", "`tfds build cifar10 --data_dir="),
    ("tfds:cifar1", "did you mean 'cifar10'"),
    ("tfds:cifar10:9.9.9", "9.9.9"),
    ("tfds", "such as 'tfds:cifar10'"),
])
def test_what_is_not_there(name, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        pipeline.open_dataset(name, str(tmp_path))
    assert "\n" not in str(error.value)


def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install advmoe_jax\[tfds\]"):
        pipeline.open_dataset("tfds:cifar10", str(tmp_path))
