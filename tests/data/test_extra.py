"""Extra images: read from .npz files without loading them, a share of every batch, and refused if they do not fit."""

import types
import zipfile

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import extra, feed, pipeline
from advmoe_jax.data.split import Arrays

SHAPE, CLASSES, OWN, EXTRA = (3, 4, 1), 5, 20, 30
NUMBERS = np.random.default_rng(0)
TRAIN = Arrays(NUMBERS.integers(0, 100, (OWN, *SHAPE), np.uint8), NUMBERS.integers(0, CLASSES, OWN).astype(np.int32))
IMAGES = NUMBERS.integers(100, 256, (EXTRA, *SHAPE), np.uint8)
LABELS = NUMBERS.integers(0, CLASSES, EXTRA)


def _cfg(path, share=0.7, batch_size=8):
    return types.SimpleNamespace(extra=str(path), extra_share=share, batch_size=batch_size, name="digits")


@pytest.fixture
def file(tmp_path):
    np.savez(tmp_path / "made.npz", image=IMAGES, label=LABELS)
    return tmp_path / "made.npz"


def _mixed(path, **how):
    return extra.mixed(_cfg(path, **how), TRAIN, CLASSES)


def test_rows_are_the_data_sets_and_then_the_files(file, tmp_path):
    """Images stay on disk; two files follow one another; compressed and Fortran-ordered arrays are the same."""
    np.savez_compressed(tmp_path / "other.npz", image=np.asfortranarray(IMAGES[:7]), label=LABELS[:7].astype(np.uint8))
    np.savez(tmp_path / "third.npz", image=np.asfortranarray(IMAGES[:2]), label=LABELS[:2].astype(">i4"))
    found = _mixed(",".join(map(str, (file, tmp_path / "other.npz", tmp_path / "third.npz"))))
    assert isinstance(found.extra[0].images.base, np.memmap) and len(found) == OWN + EXTRA + 9
    every = np.concatenate([TRAIN.images, IMAGES, IMAGES[:7], IMAGES[:2]])
    labels = np.concatenate([TRAIN.labels, LABELS, LABELS[:7], LABELS[:2]])
    rows = NUMBERS.permutation(len(found))
    batch = found.take(rows)
    np.testing.assert_array_equal(batch["image"], every[rows])
    np.testing.assert_array_equal(batch["label"], labels[rows])
    np.testing.assert_array_equal(found.labels, labels)
    assert batch["label"].dtype == found.labels.dtype == np.int32 and found.image_shape == SHAPE
    with pytest.raises(IndexError):
        found.take(np.array([len(found)]))


def test_a_batch_has_its_share(file):
    """A function of (seed, stream, step); the data set's images come once in each pass, those held out never."""
    found, rows = _mixed(file), np.arange(1, 13)
    visits = [(stream, step) for stream in ("a", "b") for step in range(24)]
    drawn = {visit: pipeline.batch_rows(found, rows, 8, 3, *visit) for visit in visits}
    for visit, of in drawn.items():
        own = of[of < OWN]
        assert len(of) == 8 and len(own) == 2 and set(own) <= set(rows) and of.max() < len(found)
        np.testing.assert_array_equal(of, pipeline.batch_rows(found, rows, 8, 3, *visit))
    passes = np.concatenate([drawn["a", step][:2] for step in range(6)])
    assert sorted(passes) == list(rows), "12 images, 2 a step"
    of_extra = np.concatenate([of[2:] for of in drawn.values()])
    assert len(set(of_extra)) == EXTRA and of_extra.min() == OWN
    assert not np.array_equal(drawn["a", 0], drawn["b", 0])
    assert not np.array_equal(drawn["a", 0][2:], pipeline.batch_rows(found, rows, 8, 4, "a", 0)[2:])
    np.testing.assert_array_equal(pipeline.batch_rows(TRAIN, rows, 8, 3, "a", 1),
                                  pipeline.batch_indices(rows, 8, 3, "a", 1))


def test_the_feed_is_the_same_on_any_devices(file):
    found, batches = _mixed(file), []
    for devices in (1, 4):
        mesh = Mesh(np.array(jax.devices()[:devices]), (meshes.AXIS,), axis_types=(AxisType.Auto,))
        with feed.opened(_cfg(file), 0, found, np.arange(OWN), lambda first: (), mesh) as batch_of:
            batches.append(jax.device_get(batch_of(5, "data")))
    for name, value in batches[0].items():
        np.testing.assert_array_equal(value, batches[1][name])
    is_extra = batches[0]["image"].min((1, 2, 3)) >= 100
    np.testing.assert_array_equal(is_extra, batches[0]["index"] >= OWN)
    assert is_extra.sum() == 6


def test_what_reports_say(file):
    assert extra.about(_cfg(file)) == "extra data: made.npz 70 %" and extra.about(_cfg("")) == ""
    assert extra.marked("AT", "extra data: a 5 %") == "AT (extra data: a 5 %)" and extra.marked("AT", "") == "AT"
    assert extra.mixed(_cfg(""), TRAIN, CLASSES) is TRAIN


@pytest.mark.parametrize("arrays, says", [
    ({"image": IMAGES}, "has no array 'label'"), ({"label": LABELS}, "has no array 'image'"),
    ({"image": IMAGES / 255, "label": LABELS}, r"image is float64 \(30, 3, 4, 1\): expected uint8 \(N, 3, 4, 1\)"),
    ({"image": IMAGES[:, :2], "label": LABELS}, r"image is uint8 \(30, 2, 4, 1\)"),
    ({"image": IMAGES[:0], "label": LABELS[:0]}, r"image is uint8 \(0, 3, 4, 1\)"),
    ({"image": IMAGES, "label": LABELS[:-1]}, r"label is int64 \(29,\): expected integers \(30,\)"),
    ({"image": IMAGES, "label": LABELS + 0.0}, "label is float64"),
    ({"image": IMAGES, "label": LABELS + 1}, "labels are 1..5: expected 0..4"),
    ({"image": IMAGES, "label": LABELS.astype(object)}, "is damaged or no .npz")])
def test_a_file_that_does_not_fit(tmp_path, arrays, says):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=f"data.extra .*bad.npz.*{says}") as told:
        _mixed(tmp_path / "bad.npz")
    assert "\n" not in str(told.value)


def test_files_that_cannot_be_read(tmp_path, file):
    with pytest.raises(UserError, match="there is no such file"):
        _mixed(tmp_path / "none.npz")
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:-40])
    np.save(tmp_path / "array.npy", IMAGES)
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("image.npy", "no array")
        archive.writestr("label.npy", "no array")
    for name in ("cut.npz", "array.npy", "text.npz"):
        with pytest.raises(UserError, match="is damaged or no .npz"):
            _mixed(tmp_path / name)


def test_a_share_that_cannot_be(file):
    for share in (0.05, 0.99):
        with pytest.raises(UserError, match="images of a batch of 8: expected at least one extra image"):
            _mixed(file, share=share)
    decoded = types.SimpleNamespace(decodes=True)
    with pytest.raises(UserError, match="whose images are decoded as they are read"):
        extra.mixed(_cfg(file), decoded, CLASSES)
    for texts, says in ((["data.extra=a.npz", "data.extra_share=1"], "expected above 0 and at most 0.999"),
                        (["data.extra=a.npz", "data.extra_share=0"], "expected above 0"),
                        (["data.extra_share=0.5"], "has no effect here: it is for a data.extra")):
        config = configs.default()
        with pytest.raises(UserError, match=says):
            configs.override_all(config, texts)
            configs.check(config)
