"""From class folders and archives to the prepared folder, through interruptions and damage."""

import io
import re
import shutil
import tarfile
import types
import zipfile

import numpy as np
import pytest
from scipy import io as scipy_io

pytest.importorskip("array_record")
import pictures  # beside this file

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import class_folders, imagenet, pipeline, shards
from advmoe_jax.data.prepare import main


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Of two images, so that there are seven or so."""
    monkeypatch.setattr(shards, "_BYTES", 2 * len(pictures.jpeg(0)) - 100)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return pictures.tree(tmp_path_factory.mktemp("raw") / "set")


@pytest.fixture
def damaged(raw, tmp_path):
    """A copy of the images, to be damaged."""
    return shutil.copytree(raw, tmp_path / "raw")


def run(raw, out, *more, name="imagefolder:set"):
    return main([name, "--out", str(out), *(["--raw", str(raw)] if raw else []), *map(str, more)])


def content(root, name="imagefolder:set"):
    """{split: sorted (label, bytes)} of what is prepared or lies in folders."""
    whole = pipeline.open_dataset(name, str(root))
    return whole.class_names, {split: sorted(
        (int(of.labels[row]), of.store.read(of.order[row])) for row in range(len(of)))
        for split, of in (("train", whole.train), ("test", whole.test))}


def state(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}


def test_prepared_is_what_lies_in_the_folders(raw, tmp_path, capsys):
    assert run(raw, tmp_path) == 0
    assert "12 train and 6 test images, 3 classes" in capsys.readouterr().out
    assert content(tmp_path) == content(raw, "imagefolder") == content(raw.parent)
    assert content(tmp_path)[0] == pictures.CLASSES
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names[0] == "meta.json" and len(names) > 6 and all(name.endswith(".array_record") for name in names[1:])
    before = state(tmp_path / "set")
    for more, words in (((), "--force writes it anew"), (("--force",), "12 train")):
        assert run(raw, tmp_path, *more) == 0 and words in capsys.readouterr().out
        assert (state(tmp_path / "set") == before) == (not more)
    assert run(None, tmp_path) == 0 and "is already prepared" in capsys.readouterr().out


def _tars(raw, folder):
    for split in ("train", "val"):
        pictures.pack(folder / f"small160_{split}.tar", raw / split)


def _tar_of_tars(raw, folder):
    """As the official archives: a tar for each class, validation images in no order, and the development kit."""
    inside = folder / "inside"
    inside.mkdir()
    for name in pictures.CLASSES:
        pictures.pack(inside / f"{name}.tar", raw / "train" / name)
    pictures.pack(folder / "ILSVRC2012_img_train.tar", inside)
    shutil.rmtree(inside)
    numbers, truth = {"n01": 2, "n02": 3, "n03": 1}, []
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in range(2):
            for name in reversed(pictures.CLASSES):
                truth.append(numbers[name])
                archive.add(raw / "val" / name / f"val_{i}.JPEG", f"./ILSVRC2012_val_{len(truth):08d}.JPEG")
    synsets = np.array([(numbers.get(name, 9), name, children) for name, children in (
        *((name, 0) for name in pictures.CLASSES), ("n00", 3))],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, text in ((imagenet._META, meta.getvalue()),
                           (imagenet._TRUTH, "".join(f"{number}\n" for number in truth).encode())):
            info = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))


@pytest.mark.parametrize("pack, name", [(_tars, "imagefolder:set"), (_tar_of_tars, "imagenet")])
def test_archives_are_as_good_as_folders(pack, name, raw, tmp_path, capsys):
    (tmp_path / "archives").mkdir()
    pack(raw, tmp_path / "archives")
    arguments = tmp_path / "archives", tmp_path / "out"
    if name == "imagenet":
        assert run(*arguments, name=name) == 2
        assert "imagenet has 12 train images, expected 1,281,167" in capsys.readouterr().err
    assert run(*arguments, "--allow-unknown-hash", name=name) == 0
    assert content(tmp_path / "out", name) == content(raw, "imagefolder")


def test_tiny_imagenet_from_its_zip_or_folder(tmp_path, capsys):
    folder = tmp_path / "tiny-imagenet-200"
    pictures.tiny_imagenet(folder)
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(tmp_path.glob("tiny-imagenet-200/**/*")):
            archive.write(path, path.relative_to(tmp_path))
    for out, given in (("a", folder), ("b", tmp_path / "tiny-imagenet-200.zip")):
        assert run(given, tmp_path / out, "--allow-unknown-hash", name="tiny_imagenet") == 0, capsys.readouterr().err
    names, found = content(tmp_path / "a", "tiny_imagenet")
    assert names == pictures.CLASSES and (names, found) == content(tmp_path / "b", "tiny_imagenet")
    assert (0, (folder / "val/images/val_3.JPEG").read_bytes()) in found["test"] and len(found["train"]) == 12
    assert run(tmp_path / "a", tmp_path / "c", name="tiny_imagenet") == 2
    assert "expected tiny-imagenet-200.zip" in capsys.readouterr().err


def test_what_was_interrupted_goes_on_after_the_last_whole_shard(raw, tmp_path, monkeypatch, capsys):
    folder, write, written = tmp_path / "set", shards._write_shard, []

    def stopped(place, file, shard):
        if len(written) == 3:  # as kill -9 in the middle of it
            (place / f".{file}.new").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(file)
        return write(place, file, shard)

    monkeypatch.setattr(shards, "_write_shard", stopped)
    assert run(raw, tmp_path) == 130
    with pytest.raises(UserError, match="no prepared imagefolder:set in .*--raw FOLDER"):
        pipeline.open_dataset("imagefolder:set", str(tmp_path))
    before = state(folder)
    assert len(before) == 3
    monkeypatch.setattr(shards, "_write_shard", write)
    (folder / written[1]).write_bytes(b"damaged since")
    capsys.readouterr()
    assert run(raw, tmp_path) == 0
    after = state(folder)
    assert [after[file] == before[file] for file in written] == [True, False, True]
    assert content(tmp_path) == content(raw, "imagefolder")
    assert not [path for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".json"
                and path.name != "meta.json"]


def _missing(path):
    path.unlink()


def _cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def _changed(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("damage, is_seen_at_the_start", [(_missing, True), (_cut_off, True), (_changed, False)])
def test_damaged_shards_are_named_and_written_again(damage, is_seen_at_the_start, raw, tmp_path, capsys):
    assert run(raw, tmp_path) == 0
    before = state(tmp_path / "set")
    damage(tmp_path / "set" / "train-00001.array_record")
    if is_seen_at_the_start:
        with pytest.raises(UserError, match="lacks 1 shards, or parts of them: train-00001.array_record; run `python"):
            pipeline.open_dataset("imagefolder:set", str(tmp_path))
    capsys.readouterr()
    assert run(None, tmp_path) == 2
    assert "1 shards are missing or damaged, as train-00001.array_record" in capsys.readouterr().err
    assert run(raw, tmp_path) == 0
    after = state(tmp_path / "set")
    assert {file for file in before if after[file] != before[file]} == {"train-00001.array_record"}
    assert content(tmp_path) == content(raw, "imagefolder")


def test_other_images_are_prepared_anew(damaged, tmp_path):
    assert run(damaged, tmp_path) == 0
    (damaged / "train/n02/train_0.JPEG").write_bytes(pictures.jpeg(50, width=30))
    (damaged / "train/n03/train_3.JPEG").unlink()
    assert run(damaged, tmp_path) == 0
    assert content(tmp_path) == content(damaged, "imagefolder")


def test_what_is_no_image_is_left_out_and_said(damaged, tmp_path, caplog):
    (damaged / "train/n02/train_0.JPEG").write_bytes(b"no image")
    (damaged / "train/n02/readme.txt").write_text("hello")
    (damaged / "train/.hidden").mkdir()
    assert run(damaged, tmp_path) == 0
    assert "train_0.JPEG is no image that can be read; left out" in caplog.text
    assert len(content(tmp_path)[1]["train"]) == 11


def _empty_class(raw):
    (raw / "train/n04").mkdir()


def _other_class(raw):
    (raw / "val/n03").rename(raw / "val/n05")


def _no_classes(raw):
    shutil.rmtree(raw / "val")
    (raw / "val").mkdir()


def _loose(raw):
    shutil.copy(raw / "val/n01/val_0.JPEG", raw / "val/loose.JPEG")


def _no_val(raw):
    shutil.rmtree(raw / "val")


def _no_tar(raw):
    shutil.rmtree(raw / "val")
    (raw / "val.tar").write_bytes(b"this is no archive" * 100)


def _half_a_tar(raw):
    pictures.pack(raw / "val.tar", raw / "val")
    shutil.rmtree(raw / "val")
    (raw / "val.tar").write_bytes((raw / "val.tar").read_bytes()[:3000])


def _two_tars(raw):
    shutil.rmtree(raw / "val")
    for name in ("a_val.tar", "b_val.tar"):
        pictures.pack(raw / name, raw / "train")


FAULTS = [(_empty_class, "class 'n04' has no train images"), (_no_classes, "test has .* in no class folder, or none"),
          (_other_class, "3 classes of train images and 3 of test images do not agree: train has 'n03'"),
          (_loose, "test has images in no class folder"), (_no_val, "no test images in .*: expected val/")]
FAULTY_TARS = [(_no_tar, "val.tar cannot be read as a .tar archive"), (_half_a_tar, "val.tar cannot be read as a .tar"),
               (_two_tars, "a_val.tar and b_val.tar: expected one archive")]


@pytest.mark.parametrize("spoil, message", FAULTS + FAULTY_TARS)
def test_bad_input(spoil, message, damaged, tmp_path, capsys):
    """Is refused before anything is written, whether it is to be prepared or read as it is."""
    spoil(damaged)
    assert run(damaged, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and not (tmp_path / "out").exists()
    assert re.search(message, told)
    if (spoil, message) in FAULTS:
        with pytest.raises(UserError, match=message):
            pipeline.open_dataset("imagefolder", str(damaged))


def test_other_refusals(raw, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (out / "set").mkdir(parents=True)
    (out / "set/mine.txt").write_text("keep me")
    for arguments, name, words in (
            ((raw, out), "imagefolder:set", "holds mine.txt, which is not of a prepared data set"),
            ((raw, out), "imagefolder", "expected imagefolder:NAME"),
            ((raw, out), "imagefolder:../x", "the name of a folder in it"),
            ((raw, "gs://bucket/data"), "imagefolder:set", "data.dir on this machine"),
            ((tmp_path / "nowhere", out), "imagefolder:other", "no train images in"),
            ((raw, out), "imagenet", "expected 1,281,167"), ((None, out), "imagenet", "no --raw to prepare it from")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # gcsfs
        assert run(*arguments, name=name) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9))
    assert run(raw, tmp_path / "small") == 2
    assert "needs" in (told := capsys.readouterr().err) and "0.000" not in told and "free" in told
    assert not list((tmp_path / "small/set").iterdir())
    with pytest.raises(UserError, match="no prepared imagenet in .*`python -m advmoe_jax.data.prepare imagenet --out"):
        pipeline.open_dataset("imagenet", str(tmp_path))


def test_a_file_that_changes_while_it_is_read(raw):
    [item, *_] = class_folders.items(raw / "train" / "n01")
    with pytest.raises(UserError, match="ends within .*expected 9999"):
        class_folders.Item(item.name, 9999, item.file).read()
