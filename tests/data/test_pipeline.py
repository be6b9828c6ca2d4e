"""Names, held-out images, and which images a step sees."""

import types

import jax
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Arrays, stratified


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match="unknown data.name 'digit'.*did you mean 'digits'"):
        pipeline.open_dataset("digit", "")


@pytest.mark.parametrize("name", ["pipeline", "prepare", "raw", "source", "split", "cifar_files", "images", "feed",
                                  "records", "shards", "class_folders", "extra"])
def test_the_other_modules_are_no_sources(name):
    with pytest.raises(UserError, match="unknown data.name"):
        pipeline.open_dataset(name, "")


def test_subset_keeps_the_first_training_images():
    whole, part = pipeline.open_dataset("digits", ""), pipeline.open_dataset("digits", "", 10)
    np.testing.assert_array_equal(part.train.take(np.arange(10))["image"], whole.train.images[:10])
    np.testing.assert_array_equal(part.train.labels, whole.train.labels[:10])
    assert len(part.train) == 10 and part.fingerprint("test") == whole.fingerprint("test")
    for subset in (-1, 1298):
        with pytest.raises(UserError, match="expected 0 .all. to 1297"):
            pipeline.open_dataset("digits", "", subset)


def test_what_is_known_without_the_files():
    """tests/data/test_prepare.py compares what is known of others with their files."""
    whole = pipeline.open_dataset("digits", "")
    assert pipeline.known(configs.default(data="digits").data) == (whole.image_shape, whole.num_classes)
    for name, expected in {"imagenet": ((224, 224, 3), 1000), "tiny_imagenet": ((64, 64, 3), 200),
                           "imagefolder:mine": ((224, 224, 3), None), "tfds:mine": (None, None)}.items():
        assert pipeline.known(configs.default(data=name).data) == expected
    config = configs.default(data="imagenet")
    config.data.image_size = 96
    assert pipeline.known(config.data)[0] == (96, 96, 3)


@pytest.mark.parametrize("num_train, expected", [
    (2, 1), (10, 1), (1_297, 130), (20_000, 2_000), (20_001, 1_000), (50_000, 1_000),
    (73_257, 1_465)])
def test_holdout_size_and_partition(num_train, expected):
    labels = np.random.default_rng(1).integers(0, 10, num_train)
    train, val = pipeline.holdout(num_train, labels)
    assert len(val) == expected and train.dtype == val.dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(num_train))
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    again = pipeline.holdout(num_train, labels.astype(np.int32))
    np.testing.assert_array_equal(again[1], val)


def test_holdout_is_even_over_classes():
    labels = np.repeat(np.arange(10), 5_000)
    _, val = pipeline.holdout(50_000, labels)
    np.testing.assert_array_equal(np.bincount(labels[val]), [100] * 10)


def test_holdout_refuses_what_cannot_be_split():
    for num_train, labels in ((1, [0]), (3, [0, 1])):
        with pytest.raises(UserError, match="cannot hold out"):
            pipeline.holdout(num_train, np.array(labels))


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_stratified_shares_are_exact_to_one(count):
    labels = np.random.default_rng(0).choice(4, 100, p=[0.7, 0.2, 0.05, 0.05])
    drawn = stratified(labels, count)
    assert len(drawn) == len(set(drawn)) == count
    exact = count * np.bincount(labels, minlength=4) / 100
    assert (np.abs(np.bincount(labels[drawn], minlength=4) - exact) < 1).all()


def test_batch_is_a_pure_function_of_seed_stream_and_step():
    indices = np.arange(100, 200)
    forward = [pipeline.batch_indices(indices, 8, 3, "lower", step) for step in range(40)]
    pipeline._permutation.cache_clear()
    for step in reversed(range(40)):  # a resumed run starts anywhere, with an empty cache
        again = pipeline.batch_indices(indices.copy(), 8, 3, "lower", step)
        np.testing.assert_array_equal(again, forward[step])
        assert again.shape == (8,) and again.dtype == np.int64


def test_an_epoch_has_no_image_twice_and_epochs_differ():
    indices = np.random.default_rng(0).permutation(50) * 3
    epochs = [np.concatenate([pipeline.batch_indices(indices, 8, 0, "s", 6 * epoch + step)
                              for step in range(6)]) for epoch in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 48 and set(epoch) <= set(indices)
    assert not np.array_equal(epochs[0], epochs[1])


def test_over_many_epochs_every_image_is_drawn():
    drawn = [pipeline.batch_indices(np.arange(10), 7, 0, "s", step) for step in range(40)]
    assert set(np.concatenate(drawn)) == set(range(10))


def test_seeds_and_streams_are_independent():
    first = pipeline.batch_indices(np.arange(1_000), 100, 0, "lower", 0)
    for seed, stream in ((1, "lower"), (0, "upper"), (-1, "lower"), (2**40, "lower")):
        other = pipeline.batch_indices(np.arange(1_000), 100, seed, stream, 0)
        assert len(set(first) & set(other)) < 40


def test_batches_do_not_change_between_versions():
    batch = pipeline.batch_indices(np.arange(1_000), 6, 0, "lower", 200)
    assert batch.tolist() == [938, 789, 121, 91, 92, 528]


def test_a_caller_cannot_spoil_the_cache():
    batch = pipeline.batch_indices(np.arange(10), 5, 0, "s", 0)
    kept = batch.copy()
    batch[:] = 0
    np.testing.assert_array_equal(pipeline.batch_indices(np.arange(10), 5, 0, "s", 0), kept)


def test_steps_per_epoch():
    assert [pipeline.steps_per_epoch(10, size) for size in (1, 3, 10)] == [10, 3, 1]
    for size in (0, 11):
        with pytest.raises(UserError, match=f"batch size is {size}, but there are 10"):
            pipeline.steps_per_epoch(10, size)
    with pytest.raises(UserError, match="batch size is 11, but there are 10"):
        pipeline.batch_indices(np.arange(10), 11, 0, "s", 0)


@pytest.mark.parametrize("size", [1, 4, 5, 10, 16])
def test_padded_batches_show_every_image_once(size):
    indices = np.arange(10)[::-1] * 2
    batches = list(pipeline.padded_batches(indices, size))
    assert all(index.shape == mask.shape == (size,) for index, mask in batches)
    assert all(index.dtype == np.int64 and mask.dtype == bool for index, mask in batches)
    np.testing.assert_array_equal(np.concatenate([index[mask] for index, mask in batches]), indices)
    last, mask = batches[-1]
    assert (last[~mask] == last[0]).all() and len(batches) == -(-10 // size)


def test_padding_edges():
    assert not list(pipeline.padded_batches(np.arange(0), 4))
    with pytest.raises(UserError, match="batch size is 0"):
        next(pipeline.padded_batches(np.arange(3), 0))


def _config(**fields):
    return types.SimpleNamespace(**({"name": "digits", "dir": "", "subset": 0} | fields))


def test_data_that_selects_on_held_out_images():
    pytest.importorskip("sklearn")
    data = pipeline.load(_config(), "validation", 100)
    labels = pipeline.open_dataset("digits", "").train.labels
    rows, held_out = pipeline.holdout(1_297, labels)
    np.testing.assert_array_equal(data.rows, rows)
    np.testing.assert_array_equal(data.select_rows, held_out[:100])
    assert data.select is data.train and len(data.test) == 500
    assert (data.num_classes, data.image_shape) == (10, (8, 8, 1))
    assert len(pipeline.load(_config(), "validation", 1_000).select_rows) == 130
    part = pipeline.load(_config(subset=200), "validation", 1_000)
    assert len(part.train) == 200 and len(part.select_rows) == 20
    np.testing.assert_array_equal(np.sort(np.concatenate([part.rows, part.select_rows])), np.arange(200))


def test_data_that_selects_on_test_images():
    pytest.importorskip("sklearn")
    data = pipeline.load(_config(subset=200), "test", 30)
    np.testing.assert_array_equal(data.rows, np.arange(200))
    np.testing.assert_array_equal(data.select_rows, np.arange(30))
    assert data.select is data.test and len(data.test) == 500 and data.rows.dtype == data.select_rows.dtype == np.int64


def _numbered(count=20):
    return Arrays(np.arange(count, dtype=np.uint8).repeat(12).reshape(count, 2, 2, 3), np.arange(count, dtype=np.int32))


def test_a_batch_is_cut_over_the_devices():
    mesh, rows = meshes.make(), np.array([7, 3, 3, 19, 0, 12, 1, 2])
    batch = pipeline.device_batch(mesh, _numbered(), rows)
    assert batch.keys() == {"image", "label", "index"}
    for name, dtype in (("image", np.uint8), ("label", np.int32), ("index", np.int32)):
        assert batch[name].dtype == dtype and batch[name].sharding == meshes.by_example(mesh)
        np.testing.assert_array_equal(np.asarray(batch[name]).reshape(8, -1)[:, 0], rows)
    assert batch["image"].shape == (8, 2, 2, 3)


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_reads_its_own_rows_only(process, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, value: value)
    taken = []

    class Recorded(Arrays):

        def take(self, rows):
            taken.append(rows)
            return super().take(rows)

    rows = np.array([7, 3, 3, 19], np.int32)
    whole = _numbered()
    batch = pipeline.device_batch(meshes.make(), Recorded(whole.images, whole.labels), rows)
    mine = rows[2 * process:2 * process + 2]
    assert len(taken) == 1 and taken[0].dtype == np.int64
    for values in (taken[0], batch["index"], batch["label"]):
        np.testing.assert_array_equal(values, mine)


def test_parts_divide_the_training_images():
    rows = np.arange(100, 203)
    parts = [pipeline.part_of(rows, f"{k} of 4", 7, "nis") for k in range(4)]
    assert sorted(map(len, parts)) == [25, 26, 26, 26] and all((np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), rows)
    np.testing.assert_array_equal(pipeline.part_of(rows, "0+2 of 4", 7, "nis"), np.union1d(parts[0], parts[2]))
    np.testing.assert_array_equal(pipeline.part_of(rows, " 0 + 1 + 2 of 3", 7), rows)
    np.testing.assert_array_equal(pipeline.part_of(rows, "", 7, "nis"), rows)
    for other in (pipeline.part_of(rows, "0 of 4", 7, "ase"), pipeline.part_of(rows, "0 of 4", 8, "nis")):
        assert len(np.intersect1d(other, parts[0])) < 20, "another name or seed is another draw"


def test_a_part_of_a_subset():
    config = _config(subset=200)
    config.part, config.part_draw = "1 of 2", "a"
    whole, part = (pipeline.load(of, "validation", 50, 3) for of in (_config(subset=200), config))
    np.testing.assert_array_equal(part.select_rows, whole.select_rows)
    np.testing.assert_array_equal(part.rows, pipeline.part_of(whole.rows, "1 of 2", 3, "a"))
    assert len(part.rows) == 90 and part.rows.max() < 200


@pytest.mark.parametrize("text", ["4 of 4", "0+0 of 2", "1", "of 3", "0 of 0", "-1 of 2", "0+1"])
def test_parts_that_cannot_be(text):
    with pytest.raises(UserError, match="data.part is .*: expected different parts"):
        pipeline.part_of(np.arange(9), text, 0)


def test_more_parts_than_images():
    with pytest.raises(UserError, match="expected no more parts"):
        pipeline.part_of(np.arange(3), "0 of 4", 0)
