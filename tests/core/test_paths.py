"""Local folders and buckets by name."""

import importlib.util
import pathlib

import pytest
from etils import epath

from advmoe_jax.core import paths
from advmoe_jax.core.errors import UserError


def test_a_local_path_is_an_ordinary_one(tmp_path):
    folder = paths.path(tmp_path) / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text("{}")
    assert (tmp_path / "a" / "b" / "x.json").read_text() == "{}"
    assert str(paths.path("data") / "x") == "data/x"
    assert not paths.is_remote(folder) and not paths.is_remote("data")


def test_a_bucket_has_the_same_methods(bucket):
    folder = paths.path("gs://b/x")
    (folder / "y.json").write_text("{}")
    with (folder / "z.bin").open("wb") as file:
        file.write(b"123")
    assert bucket.cat("b/x/y.json") == b"{}" and (folder / "z.bin").read_bytes() == b"123"
    assert sorted(path.name for path in folder.iterdir()) == ["y.json", "z.bin"]
    assert folder.is_dir() and not (folder / "w").exists()
    assert str(folder / "y.json") == "gs://b/x/y.json" and folder.name == "x"
    assert paths.is_remote(folder) and paths.is_remote("gs://b/x")


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://b/x needs gcsfs: run `pip install 'advmoe_jax\[gcs\]'`$"):
        paths.path("gs://b/x")


@pytest.mark.parametrize("text", ["s3://b/x", "http://host/x", "memory://x"])
def test_other_schemes_are_refused(text):
    with pytest.raises(UserError, match=f"{text}: expected a local path or gs://BUCKET/FOLDER"):
        paths.path(text)


def test_a_comma_or_an_at_in_a_name_that_exists_belongs_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1,bs=32", "a", "x@y"):
        (tmp_path / name).mkdir()
    assert paths.listed("lr=0.1,bs=32, a,,gs://b/c,runs/*") == ["lr=0.1,bs=32", "a", "gs://b/c", "runs/*"]
    assert paths.listed("a, lr=0.1,bs=32@last") == ["a", "lr=0.1,bs=32@last"] and paths.listed("") == []
    assert [paths.source(name) for name in ("lr=0.1,bs=32@last", "x@y", "x@y@best", "b@", "gs://b/c")] == [
        ("lr=0.1,bs=32", "last"), ("x@y", ""), ("x@y", "best"), ("b", ""), ("gs://b/c", "")]


@pytest.mark.parametrize("path, remote", [
    ("runs/a", False), (pathlib.Path("/runs/a"), False), (epath.Path("runs") / "a", False), ("gs://bucket/a", True),
    (epath.Path("gs://bucket") / "a", True), ("s3://bucket/a", True)])
def test_is_remote(path, remote):
    assert paths.is_remote(path) == remote
