"""Data sets as their authors publish them: where they are, their hashes, how files are read.

A source declares one `Official`; everything that is the same for all of them is here. Archives are
read member by member and never extracted, so that a hostile member name has nowhere to go.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.client
import logging
import os
import pathlib
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.data.source import Dataset, in_memory, writing

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20
_LARGEST = 1 << 29  # bytes; the files of a data set together are about half of it


@dataclasses.dataclass(frozen=True)
class Layout:
    """One form in which a data set is published.

    Attributes:
        folder: the folder that its archive unpacks to; "" if the files are published one by one.
        train: md5 of each file of training images, in order.
        test: the same for test images.
        decode: bytes of a file -> images (n, H, W, C) uint8, labels (n,) of any integer type.
    """

    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    decode: Callable[[bytes], tuple[np.ndarray, np.ndarray]]

    @property
    def md5(self) -> dict[str, str]:
        return {**self.train, **self.test}


@dataclasses.dataclass(frozen=True)
class Official:
    """A published data set.

    Attributes:
        name: the source's module name.
        class_names: in label order.
        urls: what to download, complete in itself.
        archives: md5 of each archive that `read` knows, by file name; empty if there is none.
        layouts: the forms it is published in, the preferred one first.
    """

    name: str
    class_names: tuple[str, ...]
    urls: tuple[str, ...]
    archives: Mapping[str, str]
    layouts: tuple[Layout, ...]

    @property
    def expects(self) -> str:
        """What `read` takes, in words."""
        files = [", ".join(layout.md5) for layout in self.layouts]
        return " or ".join([*self.archives, *(f"a folder with {names}" for names in files)])


def read(official: Official, path: str | os.PathLike, allow_unknown_hash: bool = False) -> Dataset:
    """Reads an official archive, a .zip of its files, a folder that holds the archive, or files up to two folders down.

    Args:
        official: the data set.
        path: the archive or the folder.
        allow_unknown_hash: accept files of other content, and fewer training files, with a warning.
    Raises:
        UserError: nothing of this data set there, a file missing, unreadable, there twice or far too large, another
            hash.
    """
    path = pathlib.Path(path)
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"no file or folder {path}; expected {official.expects}")
    read_any = _read_folder if path.is_dir() else _read_archive
    layout, files, verified = read_any(official, path, allow_unknown_hash)
    _check_complete(layout, files, path, allow_unknown_hash)
    if not verified:
        for name, data in files.items():
            found = hashlib.md5(data).hexdigest()
            _check_md5(f"{path}: {name}", found, layout.md5[name], allow_unknown_hash)
    arrays = {}
    for split, names in (("train", layout.train), ("test", layout.test)):
        images, labels = zip(*(_decode(layout, f"{path}: {name}", files.pop(name))
                               for name in names if name in files))
        arrays[split] = np.concatenate(images), np.concatenate(labels).astype(np.int32)
    return in_memory(official.name, arrays, official.class_names)


def download(official: Official, folder: str | os.PathLike,
             allow_unknown_hash: bool = False) -> pathlib.Path:
    """Fetches the official files into `folder`; a file that is there with the right hash is kept.

    Returns:
        What `read` takes: the one file, or `folder` if there are several.
    Raises:
        UserError: no network, or the hash of what came differs.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(official.archives)
    for layout in official.layouts:
        known |= layout.md5
    targets = [folder / url.rsplit("/", 1)[-1] for url in official.urls]
    for url, target in zip(official.urls, targets):
        if target.exists() and _file_md5(target) == known[target.name]:
            continue
        part = target.with_name(target.name + ".part")
        try:
            size, chunks = _fetch(url)
            with writing(folder, size), part.open("wb") as file:
                file.writelines(chunks)
            _check_md5(url, _file_md5(part), known[target.name], allow_unknown_hash)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    return targets[0] if len(targets) == 1 else folder


def _read_folder(official, path, allow_unknown_hash):
    """Returns the layout found, bytes by file name, and whether the hash of an archive vouches for them."""
    for layout in official.layouts:
        for pattern in ("", layout.folder, "*", f"*/{layout.folder}"):
            found = [file for name in layout.md5 for file in sorted(path.glob(str(pathlib.PurePath(pattern, name))))]
            members = ((str(file.relative_to(path)), file.stat().st_size, file.read_bytes)
                       for file in found if file.is_file())
            if files := _collect(path, members, layout.md5):
                return layout, files, False
    for archive in (path / name for name in official.archives):
        if archive.is_file():
            return _read_archive(official, archive, allow_unknown_hash)
    raise UserError(f"nothing of {official.name} in {path}; expected {official.expects}")


def _read_archive(official, path, allow_unknown_hash):
    """As `_read_folder`."""
    found = _file_md5(path)
    verified = found in official.archives.values()
    if not verified and path.name in official.archives:
        _check_md5(str(path), found, official.archives[path.name], allow_unknown_hash)
    try:
        files = _collect(path, _members(path), {name for layout in official.layouts for name in layout.md5})
    except UserError:
        raise
    except Exception:  # foreign bytes fail in any way: there is no common base class
        raise UserError(f"{path} is not a readable .tar.gz or .zip archive, or not all of it; expected "
                        f"{official.expects}") from None
    for layout in official.layouts:
        mine = {name: files[name] for name in layout.md5 if name in files}
        if mine:
            return layout, mine, verified
    raise UserError(f"nothing of {official.name} in {path}; expected {official.expects}")


def _members(path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """The name, size and content of every file in an archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in (member for member in archive.infolist() if not member.is_dir()):
                yield member.filename, member.file_size, functools.partial(archive.read, member)
    else:
        with tarfile.open(path, "r:*") as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                yield member.name, member.size, archive.extractfile(member).read


def _collect(path, members: Iterable[tuple[str, int, Callable[[], bytes]]], wanted) -> dict[str, bytes]:
    """Bytes by file name of those `members` of a folder or archive that are `wanted`, wherever in it they are."""
    files, origins, total = {}, {}, 0
    for where, size, content in members:
        name = pathlib.PurePosixPath(where)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"{path} holds the unsafe member {where!r}: expected an official archive")
        if name.name not in wanted:
            continue
        if name.name in origins:
            raise UserError(f"{path} holds {name.name} twice, as {origins[name.name]!r} and as {where!r}: expected one")
        total, origins[name.name] = total + size, where
        if total > _LARGEST:
            raise UserError(f"{path}: {where!r} has {size >> 20:,} MB: expected official files, "
                            f"at most {_LARGEST >> 20} MB together")
        files[name.name] = content()
    return files


def _check_complete(layout, files, path, allow_unknown_hash):
    missing = [name for name in layout.md5 if name not in files]
    if not missing:
        return
    text = f"{path} lacks {', '.join(missing)}"
    usable = all(files.keys() & part.keys() for part in (layout.train, layout.test))
    if not (allow_unknown_hash and usable):
        raise UserError(f"{text}; expected {', '.join(layout.md5)}")
    _log.warning("%s: read without", text)


def _check_md5(what, found, expected, allow_unknown_hash):
    if found == expected:
        return
    text = f"{what} has md5 {found}, expected {expected}"
    if not allow_unknown_hash:
        raise UserError(f"{text}: not the official file; "
                        "fetch it again, or accept it by --allow-unknown-hash")
    _log.warning("%s: accepted", text)


def _decode(layout, what, data):
    try:
        return layout.decode(data)
    except Exception as error:  # foreign bytes fail in any way: there is no common base class
        raise UserError(f"{what} cannot be read: {' '.join(str(error).split())}") from None


def _file_md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _fetch(url, timeout_s=60) -> tuple[int, Iterator[bytes]]:
    """Returns the size of a download, 0 if unknown, and its bytes in chunks."""
    with _network(url):
        response = urllib.request.urlopen(url, timeout=timeout_s)
        size = int(response.headers.get("Content-Length") or 0)
    return size, _chunks(url, response, size)


def _chunks(url, response, size):
    """Yields what comes, with a progress line on the log about every five seconds."""
    done, due = 0, time.monotonic()
    with _network(url), response:
        while chunk := response.read(_CHUNK):
            done += len(chunk)
            if time.monotonic() >= due:
                _log.info("%s: %d MB%s", url, done >> 20, f" of {size >> 20}" if size else "")
                due = time.monotonic() + 5
            yield chunk
        if done < size:
            raise OSError(f"the connection ended after {done} of {size} bytes")


@contextlib.contextmanager
def _network(url):
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"could not download {url} ({reason}); fetch it where there is a network, then add "
                        "`--raw PATH` to the command") from None
