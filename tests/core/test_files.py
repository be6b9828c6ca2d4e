"""Files are whole or not there; object stores get one write a file."""

import hashlib
import os
import pathlib
import re

import numpy as np
import pytest
from etils import epath
from etils.epath.testing import mock_epath

from advmoe_jax.core import files
from advmoe_jax.core.errors import NoSpace

KINDS = pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path])


@pytest.fixture
def bucket(tmp_path):
    """gs://bucket is a folder here, in which files can be read and written, and nothing else. The writes are kept."""
    writes = []

    def local(path):
        return tmp_path / path.removeprefix("gs://bucket/")

    def opened(original, path, mode):
        if "r" not in mode:
            writes.append((path, mode))
        return original(local(path), mode)

    def only_local(original, *paths, **kwargs):
        assert not any(path.startswith("gs:") for path in paths), "object stores have no folders and rename nothing"
        return original(*paths, **kwargs)

    with mock_epath(open=opened, exists=lambda original, path: original(local(path)),
                    **dict.fromkeys(("makedirs", "mkdir", "rename", "replace", "remove"), only_local)):
        yield tmp_path, writes


@KINDS
def test_a_local_write_makes_folders_and_leaves_one_file(kind, tmp_path):
    path = tmp_path / "a" / "b" / "x.json"
    for content in ({"n": 1}, {"n": 2}):
        files.write_json(kind(path), content)
        assert path.read_text() == f'{{\n  "n": {content["n"]}\n}}\n'
    assert [found.name for found in path.parent.iterdir()] == ["x.json"] and path.stat().st_mode & 0o777 == 0o644
    files.write_text(kind(path), "ä")
    assert path.read_bytes() == b"\xc3\xa4"


@pytest.mark.parametrize("fails", ["fsync", "replace", "chmod"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(fails, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "x"
    files.write_text(path, "old")
    with monkeypatch.context() as patch, pytest.raises(NoSpace) as error:
        patch.setattr(os, fails, fail)
        files.write_text(path, "new")
    assert re.fullmatch(rf"no space left for {path}: 3 bytes were to be written, and the disk of {tmp_path} takes "
                        r"[\d,]+ bytes; the same command continues when there is room", str(error.value))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def _raised(error, cause=None):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("error, full", [
    (OSError(28, "No space left on device"), True), (OSError(122, "Disk quota exceeded"), True),
    (ValueError("RESOURCE_EXHAUSTED: write [OS error 28: No space left on device]"), True),  # as storages say it
    (_raised(RuntimeError("the save failed"), OSError(28, "")), True),
    (OSError(5, "Input/output error"), False), (ValueError("x"), False)])
def test_a_full_disk_is_named_and_other_errors_stay(error, full, tmp_path):
    with pytest.raises(NoSpace if full else type(error)) as caught, files.room(tmp_path / "new" / "x", 12345678):
        raise error
    said = str(caught.value)
    assert "\n" not in said and (not full or f"{tmp_path}/new/x: 12,345,678 bytes" in said)
    if isinstance(error, OSError) and not full:
        assert str(tmp_path) in said, "the system does not always say which file"


def test_what_killed_writes_left_is_removed_and_what_is_being_written_stays(tmp_path, monkeypatch):
    left = tmp_path / "eval" / "id" / ".examples.csv.x1y2z3_w.part"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    (tmp_path / ".mine").write_text("")
    fsync = os.fsync

    def meanwhile(handle):
        files.remove_leftovers(tmp_path)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    files.write_text(tmp_path / "x", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "eval", "x"] and not left.exists()


@pytest.mark.parametrize("content, steps, whole", [
    (b'{"step": 0}\n{"step": 1}\n', [0, 1], True), (b'{"step": 0}\n{"st', [0], True), (b"", [], True),
    (b'{"step": 0}\n{"st\n{"step": 2}\n', [0], False), (b'{"step": 0}\n[1]\n', [0], False),
    (b'{"step": 0}\n{"epoch": 1}\n', [0], False), (b'{"step": 0}\n\xff\xfe\n', [0], False)])
def test_damage_of_json_lines(content, steps, whole, tmp_path):
    (tmp_path / "log").write_bytes(content)
    assert files.check_json_lines(tmp_path / "log", {"step"}) == ([{"step": step} for step in steps], whole)


def test_the_content_is_on_disk_before_its_name(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "x"
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_size), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    files.write_bytes(path, b"12345")
    assert calls == [5, "replace"]


@KINDS
def test_json_lines(kind, tmp_path):
    path = tmp_path / "a" / "log.jsonl"
    assert files.read_json_lines(kind(path)) == []
    for step in range(3):
        files.append_json_line(kind(path), {"step": step})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'
    assert files.read_json_lines(kind(path)) == [{"step": step} for step in range(3)]


@pytest.mark.parametrize("whole", ['', '{"step": 0}\n', '{"step": 0}\n{"step": 1}\n'])
@pytest.mark.parametrize("remote", [False, True])
def test_a_last_line_that_was_cut_off_is_left_out_and_replaced(whole, remote, bucket):
    path = bucket[0] / "log.jsonl"
    path.write_text(whole + '{"step": 7, "lo')
    name = "gs://bucket/log.jsonl" if remote else path
    assert files.read_json_lines(name) == [{"step": step} for step in range(whole.count("\n"))]
    files.append_json_line(name, {"step": 9})
    assert path.read_text() == whole + '{"step": 9}\n'


def test_an_object_store_gets_one_write_a_file(bucket):
    folder, writes = bucket
    assert files.read_json_lines("gs://bucket/log.jsonl") == []
    for step in range(2):
        files.append_json_line(epath.Path("gs://bucket/log.jsonl"), {"step": step})
    files.write_json("gs://bucket/x.json", [1])
    files.write_npz(epath.Path("gs://bucket") / "x.npz", {"a": np.arange(3)})
    assert writes == [(f"gs://bucket/{name}", "wb") for name in ("log.jsonl", "log.jsonl", "x.json", "x.npz")]
    assert files.read_json_lines("gs://bucket/log.jsonl") == [{"step": 0}, {"step": 1}]
    assert (folder / "x.json").read_text() == "[\n  1\n]\n"
    assert sorted(found.name for found in folder.iterdir()) == ["log.jsonl", "x.json", "x.npz"]


def test_npz_leaves_none_out(tmp_path):
    files.write_npz(tmp_path / "x.npz", {"a": np.arange(4, dtype=np.int16), "b": None, "c": np.float32(2)})
    with np.load(tmp_path / "x.npz") as found:
        assert sorted(found) == ["a", "c"] and found["a"].dtype == np.int16 and found["c"] == 2
        np.testing.assert_array_equal(found["a"], range(4))


def test_a_figure_is_a_png(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    files.write_figure(tmp_path / "x.png", figure)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_fingerprint():
    """Of the bytes in the order of the names; names, shapes and types do not count."""
    image, label = np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([0, 1], "<i4")
    arrays = {"image": image, "label": label}
    assert files.fingerprint(arrays) == hashlib.sha256(bytes(range(6)) + bytes((0, 0, 0, 0, 1, 0, 0, 0))).hexdigest()
    assert files.fingerprint(arrays) == files.fingerprint(dict(reversed(arrays.items())))
    assert files.fingerprint(arrays) == files.fingerprint({"a": np.asfortranarray(image), "b": label.view(np.uint8)})
    assert files.fingerprint(arrays) != files.fingerprint({"a": label, "b": image})
    assert files.fingerprint(arrays) != files.fingerprint(arrays | {"label": np.array([1, 0], "<i4")})
    assert files.fingerprint({"a": np.float32(1)}) == hashlib.sha256(b"\x00\x00\x80\x3f").hexdigest()
