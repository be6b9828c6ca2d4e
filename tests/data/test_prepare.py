"""From official files, here tiny imitations of them, to the prepared folder."""

import hashlib
import importlib.util
import io
import os
import pathlib
import pickle
import re
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import io as scipy_io

from advmoe_jax.core import find
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import raw
from advmoe_jax.data.cifar_files import decode_pickle
from advmoe_jax.data.prepare import main
from advmoe_jax.data.source import read_prepared

UNPACK = pathlib.Path(__file__).parents[3] / "shared" / "data" / "unpack_cifar10.py"
N = 7  # images in each imitated file
LAYOUTS = [("cifar10", "cifar-10-batches-bin"), ("cifar10", "cifar-10-batches-py"),
           ("cifar100", "cifar-100-binary"), ("cifar100", "cifar-100-python"), ("svhn", "")]


def _layout(name, folder):
    official = importlib.import_module(f"advmoe_jax.data.{name}").OFFICIAL
    return next(layout for layout in official.layouts if layout.folder == folder)


def _encode(name, folder, images, labels):
    """Bytes of one official file. The coarse label of CIFAR-100 is wrong on purpose."""
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
    if name == "svhn":
        buffer = io.BytesIO()
        y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy_io.savemat(buffer, {"X": images.transpose(1, 2, 3, 0), "y": y})
        return buffer.getvalue()
    if folder.endswith(("bin", "binary")):
        coarse = [np.full_like(labels, 19)] if name == "cifar100" else []
        return np.column_stack([*coarse, labels, planes]).astype(np.uint8).tobytes()
    keys = {"cifar10": [b"labels"], "cifar100": [b"coarse_labels", b"fine_labels"]}[name]
    values = [[19] * len(labels), labels.tolist()][-len(keys):]
    batch = {b"data": planes, b"batch_label": b"x", **dict(zip(keys, values))}
    return pickle.dumps(batch, protocol=2)


def _write_folder(where, name, folder):
    """Writes an imitation; returns (folder of the files, train and test images and labels)."""
    rng = np.random.default_rng(0)
    layout = _layout(name, folder)
    (where / folder).mkdir(parents=True, exist_ok=True)
    parts = []
    for files in (layout.train, layout.test):
        images, labels = [], []
        for file in files:
            images.append(rng.integers(0, 256, (N, 32, 32, 3), np.uint8))
            labels.append(rng.integers(0, 10, N))
            labels[-1][0] = 0
            (where / folder / file).write_bytes(_encode(name, folder, images[-1], labels[-1]))
        parts += [np.concatenate(images), np.concatenate(labels)]
    return where / folder, parts


def _pack(folder, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive


def _run(*arguments):
    return main([str(argument) for argument in arguments])


def _check(name, out, parts):
    dataset = read_prepared(name, out)
    known = find.module("data", name, defines="dataset").KNOWN
    assert (known.image_shape, known.num_classes) == (dataset.image_shape, dataset.num_classes)
    got = (dataset.train.images, dataset.train.labels, dataset.test.images, dataset.test.labels)
    for left, right in zip(got, parts):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("name, folder", LAYOUTS)
def test_every_layout_is_read_from_folders_above_and_archives(name, folder, tmp_path, capsys):
    files, parts = _write_folder(tmp_path / "in" / "raw", name, folder)
    paths = [files, tmp_path / "in" / "raw", tmp_path / "in",
             shutil.make_archive(tmp_path / "a", "zip", files), _pack(files, tmp_path / "renamed.tar.gz")]
    if folder:
        official = next(iter(importlib.import_module(f"advmoe_jax.data.{name}").OFFICIAL.archives))
        (tmp_path / "holds").mkdir()
        paths.append(_pack(files, tmp_path / "holds" / official).parent)
    for number, path in enumerate(paths):
        out = tmp_path / f"out{number}"
        assert _run(name, "--raw", path, "--out", out, "--allow-unknown-hash") == 0
        _check(name, out, parts)
        assert os.listdir(out) == [name]
    assert "images of 32x32x3" in capsys.readouterr().out


@pytest.mark.parametrize("name, folder", LAYOUTS)
def test_a_wrong_hash_names_file_found_and_expected(name, folder, tmp_path, capsys):
    files, _ = _write_folder(tmp_path / "raw", name, folder)
    assert _run(name, "--raw", files, "--out", tmp_path / "out") == 2
    layout = _layout(name, folder)
    first = next(iter(layout.train))
    found = hashlib.md5((files / first).read_bytes()).hexdigest()
    message = capsys.readouterr().err
    assert first in message and found in message and layout.train[first] in message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out" / name).exists()


def test_an_archive_with_an_official_name_must_have_its_hash(tmp_path, capsys, caplog):
    files, parts = _write_folder(tmp_path, "cifar10", "cifar-10-batches-bin")
    archive = _pack(files, tmp_path / "cifar-10-binary.tar.gz")
    assert _run("cifar10", "--raw", archive, "--out", tmp_path / "out") == 2
    assert "c32a1d4ab5d03f1284b67883e8d87530" in capsys.readouterr().err
    assert _run("cifar10", "--raw", archive, "--out", tmp_path / "out", "--allow-unknown-hash") == 0
    assert "c32a1d4ab5d03f1284b67883e8d87530: accepted" in caplog.text
    _check("cifar10", tmp_path / "out", parts)


def test_a_known_archive_is_accepted_under_any_name(tmp_path):
    files, parts = _write_folder(tmp_path, "cifar10", "cifar-10-batches-py")
    archive = _pack(files, tmp_path / "x.tgz")
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    official = importlib.import_module("advmoe_jax.data.cifar10").OFFICIAL
    known = raw.Official(official.name, official.class_names, official.urls,
                         {"official.tar.gz": digest}, official.layouts)
    np.testing.assert_array_equal(raw.read(known, archive).train.images, parts[0])


@pytest.mark.parametrize("content", [b"", b"not an archive at all", "cut"])
def test_a_corrupt_archive_is_one_clear_line(content, tmp_path, capsys):
    archive = tmp_path / "x.tar.gz"
    if content == "cut":
        files, _ = _write_folder(tmp_path, "cifar10", "cifar-10-batches-bin")
        data = _pack(files, archive).read_bytes()
        content = data[:len(data) // 2]
    archive.write_bytes(content)
    for flags in ([], ["--allow-unknown-hash"]):
        assert _run("cifar10", "--raw", archive, "--out", tmp_path / "out", *flags) == 2
        message = capsys.readouterr().err
        assert "not a readable .tar.gz or .zip archive" in message and message.count("\n") == 1
    assert not (tmp_path / "out" / "cifar10").exists()


@pytest.mark.parametrize("name", ["../evil/data_batch_1.bin", "/abs/data_batch_1.bin"])
def test_an_archive_that_climbs_out_is_refused(name, tmp_path, capsys):
    archive = tmp_path / "x.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    assert _run("cifar10", "--raw", archive, "--out", tmp_path / "out", "--allow-unknown-hash") == 2
    assert "unsafe member" in capsys.readouterr().err


def _twice_in_folders(files, where):
    shutil.copytree(files, where / "a")
    shutil.copytree(files, where / "b")
    return where


def _twice_in_a_tar(files, where):
    with tarfile.open(where.with_suffix(".tar.gz"), "w:gz") as tar:
        tar.add(files, arcname="a")
        tar.add(files, arcname="b")
    return where.with_suffix(".tar.gz")


def _twice_in_a_zip(files, where):
    _twice_in_folders(files, where)
    return shutil.make_archive(where, "zip", where)


@pytest.mark.parametrize("twice", [_twice_in_folders, _twice_in_a_tar, _twice_in_a_zip])
def test_files_that_are_there_twice_are_refused(twice, tmp_path, capsys):
    files, _ = _write_folder(tmp_path / "raw", "cifar10", "cifar-10-batches-bin")
    path = twice(files, tmp_path / "twice")
    assert _run("cifar10", "--raw", path, "--out", tmp_path / "out", "--allow-unknown-hash") == 2
    message = capsys.readouterr().err
    assert re.search(r"holds (data_batch_\d|test_batch).bin twice, as '[ab]/\1.bin' and as '[ab]/\1.bin'", message)
    assert message.count("\n") == 1


def test_a_huge_member_is_refused_unread():
    def read():
        raise AssertionError("it was read")

    with pytest.raises(UserError, match="'x/a' has 3,000 MB: expected official files, at most 512 MB together"):
        raw._collect("b.tar", [("x/a", 3000 << 20, read)], {"a"})
    with pytest.raises(UserError, match="'x/c'"):
        raw._collect("b.tar", [("x/a", 300 << 20, bytes), ("x/c", 300 << 20, read)], {"a", "c"})


def test_a_device_is_no_archive(tmp_path, capsys):
    assert _run("cifar10", "--raw", os.devnull, "--out", tmp_path) == 2  # /dev/zero has no end
    assert f"no file or folder {os.devnull}" in capsys.readouterr().err


def test_coarse_labels_alone(tmp_path, capsys):
    files, _ = _write_folder(tmp_path, "cifar100", "cifar-100-python")
    (files / "train").write_bytes(pickle.dumps({b"coarse_labels": [1], b"data": np.zeros((1, 3072), np.uint8)}))
    assert _run("cifar100", "--raw", files, "--out", tmp_path / "out", "--allow-unknown-hash") == 2
    assert "train cannot be read: it has no 'fine_labels', only 'coarse_labels', 'data'" in capsys.readouterr().err


def test_a_link_in_an_archive_is_not_followed(tmp_path, capsys):
    archive = tmp_path / "x.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    assert _run("cifar10", "--raw", archive, "--out", tmp_path / "out", "--allow-unknown-hash") == 2
    assert "nothing of cifar10" in capsys.readouterr().err


class _Bomb:

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, capsys):
    files, _ = _write_folder(tmp_path, "cifar10", "cifar-10-batches-py")
    (files / "data_batch_2").write_bytes(pickle.dumps({b"data": _Bomb(tmp_path / "boom")}))
    assert _run("cifar10", "--raw", files, "--out", tmp_path / "out", "--allow-unknown-hash") == 2
    message = capsys.readouterr().err
    assert "data_batch_2 cannot be read" in message and "mkdir" in message
    assert not (tmp_path / "boom").exists()


def test_a_python_2_pickle_is_read():
    old = (b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
           b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R"
           b"q\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
           + bytes(range(256)) * 12 + b"tbU\x06labelsq\x08]q\tK\x03au.")
    images, labels = decode_pickle(old, "labels")
    assert images.shape == (1, 32, 32, 3) and labels.tolist() == [3]
    assert images[0, 0, :3, 0].tolist() == [0, 1, 2] and images[0, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("damage, message", [
    ("cut", "expected a multiple of 3073"), ("label", "0..9")])
def test_damaged_records(damage, message, tmp_path, capsys):
    files, _ = _write_folder(tmp_path, "cifar10", "cifar-10-batches-bin")
    path = files / "data_batch_3.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "cut" else b"\xff" + data[1:])
    assert _run("cifar10", "--raw", files, "--out", tmp_path / "out", "--allow-unknown-hash") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["junk", "empty"])
@pytest.mark.parametrize("name, folder", [("svhn", ""), ("cifar100", "cifar-100-python")])
def test_unreadable_files(name, folder, damage, tmp_path, capsys):
    files, _ = _write_folder(tmp_path, name, folder)
    first = next(iter(_layout(name, folder).train))
    (files / first).write_bytes(b"\x00junk" * 100 if damage == "junk" else b"")
    assert _run(name, "--raw", files, "--out", tmp_path / "out", "--allow-unknown-hash") == 2
    message = capsys.readouterr().err
    assert f"{first} cannot be read" in message and message.count("\n") == 1


def test_missing_batches_are_named_and_a_subset_must_be_allowed(tmp_path, capsys, caplog):
    files, parts = _write_folder(tmp_path, "cifar10", "cifar-10-batches-bin")
    (files / "data_batch_5.bin").unlink()
    assert _run("cifar10", "--raw", files, "--out", tmp_path / "out") == 2
    assert "lacks data_batch_5.bin" in capsys.readouterr().err
    assert _run("cifar10", "--raw", files, "--out", tmp_path / "out", "--allow-unknown-hash") == 0
    assert "lacks data_batch_5.bin: read without" in caplog.text
    assert len(read_prepared("cifar10", tmp_path / "out").train) == 4 * N
    (files / "test_batch.bin").unlink()
    assert _run("cifar10", "--raw", files, "--out", tmp_path / "out2", "--allow-unknown-hash") == 2


def test_nothing_there(tmp_path, capsys):
    assert _run("svhn", "--raw", tmp_path / "no", "--out", tmp_path / "out") == 2
    assert "no file or folder" in capsys.readouterr().err
    assert _run("cifar100", "--raw", tmp_path, "--out", tmp_path / "out") == 2
    assert "nothing of cifar100" in capsys.readouterr().err
    (tmp_path / "train_32x32.mat").write_bytes(b"x")
    assert _run("svhn", "--raw", tmp_path / "train_32x32.mat", "--out", tmp_path / "out") == 2
    assert "a folder with train_32x32.mat, test_32x32.mat" in capsys.readouterr().err


def test_a_second_run_keeps_what_is_there_unless_forced(tmp_path, capsys):
    files, _ = _write_folder(tmp_path / "a", "cifar10", "cifar-10-batches-bin")
    out = tmp_path / "out"
    arguments = ("cifar10", "--raw", files, "--out", out, "--allow-unknown-hash")
    assert _run(*arguments) == 0
    before = (out / "cifar10" / "meta.json").stat().st_mtime_ns
    assert _run(*arguments) == 0
    assert "already prepared" in capsys.readouterr().out
    assert (out / "cifar10" / "meta.json").stat().st_mtime_ns == before
    (out / "cifar10" / "test_labels.npy").write_bytes(b"")
    assert _run(*arguments) == 2
    assert "test_labels.npy is damaged" in capsys.readouterr().err
    assert _run(*arguments, "--force") == 0
    read_prepared("cifar10", out)
    assert os.listdir(out) == ["cifar10"]


@pytest.mark.parametrize("name, message", [
    ("cifr10", "did you mean 'cifar10'"),
    ("cifar10:3.0.2", "has no variant '3.0.2'"),
    ("digits", "needs no preparation"),
    ("tfds:cifar10", "`tfds build cifar10 --data_dir="),
])
def test_names_without_official_files(name, message, tmp_path, capsys):
    assert _run(name, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_every_source_can_be_prepared_or_says_how():
    for name in find.names("data", "dataset"):
        module = find.module("data", name, "dataset")
        assert sum(hasattr(module, way) for way in ("OFFICIAL", "how_to_prepare", "raw_images")) == 1
        if hasattr(module, "OFFICIAL"):
            official = module.OFFICIAL
            hashes = [*official.archives.values()]
            for layout in official.layouts:
                hashes += layout.md5.values()
            assert official.name == name and len(hashes) == len(set(hashes))
            assert all(len(digest) == 32 and int(digest, 16) for digest in hashes)
            assert len(official.class_names) == len(set(official.class_names)) in (10, 100)


class _Response(io.BytesIO):
    headers = {}


def _serve(monkeypatch, files):
    def urlopen(url, timeout):
        del timeout
        if url.rsplit("/", 1)[-1] not in files:
            raise urllib.error.URLError("no route")
        return _Response(files[url.rsplit("/", 1)[-1]])
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_no_network_says_to_use_raw(tmp_path, capsys, monkeypatch):
    _serve(monkeypatch, {})
    assert _run("cifar10", "--out", tmp_path) == 2
    message = capsys.readouterr().err
    assert "no route" in message and "--raw PATH" in message and message.count("\n") == 1
    assert not os.listdir(tmp_path / "downloads")


@pytest.mark.parametrize("name, folder", [("svhn", ""), ("cifar100", "cifar-100-binary")])
def test_download_goes_on_like_raw(name, folder, tmp_path, monkeypatch):
    files, parts = _write_folder(tmp_path / "site", name, folder)
    if folder:
        _pack(files, tmp_path / "site" / "cifar-100-binary.tar.gz")
    served = {path.name: path.read_bytes()
              for path in (tmp_path / "site").iterdir() if path.is_file()}
    _serve(monkeypatch, served)
    assert _run(name, "--out", tmp_path / "out", "--allow-unknown-hash") == 0
    _check(name, tmp_path / "out", parts)
    assert sorted(os.listdir(tmp_path / "out" / "downloads")) == sorted(served)


def test_download_into_a_bucket(bucket, tmp_path, monkeypatch):
    files, parts = _write_folder(tmp_path / "site", "svhn", "")
    _serve(monkeypatch, {path.name: path.read_bytes() for path in files.iterdir()})
    assert _run("svhn", "--out", "gs://b/data", "--allow-unknown-hash") == 0
    _check("svhn", "gs://b/data", parts)
    assert bucket.ls("b/data", detail=False) == ["/b/data/svhn"]


def test_a_bucket_without_its_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _run("svhn", "--raw", tmp_path, "--out", "gs://b/data") == 2
    message = capsys.readouterr().err
    assert "pip install 'advmoe_jax[gcs]'" in message and message.count("\n") == 1


def test_a_download_with_another_hash_is_not_kept(tmp_path, monkeypatch, capsys):
    _serve(monkeypatch, {"cifar-10-binary.tar.gz": b"a captive portal"})
    assert _run("cifar10", "--out", tmp_path) == 2
    assert "expected c32a1d4ab5d03f1284b67883e8d87530" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "downloads")


def test_a_broken_connection_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_Response, "headers", {"Content-Length": "1000"})
    _serve(monkeypatch, {"cifar-10-binary.tar.gz": b"x"})
    assert _run("cifar10", "--out", tmp_path, "--allow-unknown-hash") == 2
    assert "after 1 of 1000 bytes" in capsys.readouterr().err


def test_a_download_that_has_no_room(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_Response, "headers", {"Content-Length": str(10**18)})
    _serve(monkeypatch, {"cifar-10-binary.tar.gz": b"x"})
    assert _run("cifar10", "--out", tmp_path, "--allow-unknown-hash") != 0
    assert "downloads: no room for 1,000,000,000,000.0 MB: its disk has" in capsys.readouterr().err
    assert not os.listdir(tmp_path / "downloads")


def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    files, _ = _write_folder(tmp_path / "raw", "cifar10", "cifar-10-batches-bin")
    arguments = ("cifar10", "--raw", files, "--out", tmp_path / "out", "--allow-unknown-hash")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        assert _run(*arguments) != 0
    assert f"error: {tmp_path / 'out'}: no room for 0.1 MB: its disk has 0.1 MB free" in capsys.readouterr().err
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert _run(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = capsys.readouterr().err
    assert "out: 0.1 MB were to be written: File too large" in message and message.count("\n") == 1
    assert os.listdir(tmp_path / "out") == []


def test_leftovers_of_killed_processes_go(tmp_path, capsys):
    files, parts = _write_folder(tmp_path / "raw", "svhn", "")
    arguments = ("svhn", "--raw", files, "--out", tmp_path, "--allow-unknown-hash")
    assert _run(*arguments) == 0
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = [tmp_path / f".svhn.{host}.{pid}.new" for host, pid in (
        (socket.gethostname(), dead.pid), (socket.gethostname(), os.getppid()), ("elsewhere", dead.pid))]
    for folder in left:
        folder.mkdir()
    assert _run(*arguments) == 0
    assert [folder.exists() for folder in left] == [False, True, True]
    (tmp_path / "svhn").rename(left[0].with_suffix(".old"))
    assert _run(*arguments) == 0
    assert "already prepared" in capsys.readouterr().out and not left[0].with_suffix(".old").exists()
    _check("svhn", tmp_path, parts)


def test_unwritable_out(tmp_path, capsys):
    files, _ = _write_folder(tmp_path, "svhn", "")
    (tmp_path / "file").write_text("x")
    arguments = ("--raw", files, "--out", tmp_path / "file", "--allow-unknown-hash")
    assert _run("svhn", *arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_command_line():
    root = pathlib.Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-m", "advmoe_jax.data.prepare", "--help"],
                         capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.count("\n") < 24 and "cifar10, cifar100, imagefolder," in run.stdout


@pytest.mark.slow
def test_real_cifar10(tmp_path):
    if not UNPACK.exists():
        pytest.skip(f"the real images are not here: {UNPACK} is absent")
    subprocess.run([sys.executable, UNPACK, tmp_path / "raw"], check=True, capture_output=True)
    assert _run("cifar10", "--raw", tmp_path / "raw", "--out", tmp_path / "out") == 0
    dataset = read_prepared("cifar10", tmp_path / "out")
    assert np.bincount(dataset.train.labels).tolist() == [5000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1000] * 10
    # The channel means and deviations that are published everywhere: red 0.4914, 0.2470 and so on.
    values = np.arange(256) / 255
    for channel, mean, deviation in ((0, 0.4914, 0.2470), (1, 0.4822, 0.2435), (2, 0.4465, 0.2616)):
        counts = np.bincount(dataset.train.images[..., channel].ravel(), minlength=256)
        share = counts / counts.sum()
        assert share @ values == pytest.approx(mean, abs=5e-5)
        assert np.sqrt(share @ values**2 - (share @ values)**2) == pytest.approx(deviation, abs=5e-5)
