"""Image files in class folders, as they lie on disk or in archives, which are never extracted."""

import dataclasses
import functools
import logging
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Iterable, Iterator

from advmoe_jax.core.errors import UserError

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
"""What a folder or archive of each split is called, the preferred name first."""
_log = logging.getLogger(__name__)
_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A file in a folder or an archive.

    Attributes:
        name: "train/n01440764/a.JPEG", from the folder or archive on; a folder that holds nothing ends in "/".
        size: bytes.
        file: the file itself, or the archive.
        offset: where it begins in `file`; -1 for a member of a zip archive.
    """

    name: str
    size: int
    file: str
    offset: int = 0

    def read(self) -> bytes:
        """Its content. Raises UserError if there is less of it than there was."""
        if self.offset < 0:
            return _zip(self.file).read(self.name)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise UserError(f"{self.file} ends within {self.name}: expected {self.size} bytes of it, found "
                            f"{len(content)}")
        return content


Classes = dict[str, list[Item]]
"""Images of each class, both in the order of their names."""


def items(path: pathlib.Path) -> Iterator[Item]:
    """All files below a folder or in a tar or zip archive, and folders that hold nothing.

    A tar archive within one counts as a folder of its name.

    Raises:
        UserError: there is no such file, or it is no readable archive.
    """
    if not path.exists():
        raise UserError(f"no file or folder {path}")
    if path.is_dir():
        return _of_folder(path)
    if zipfile.is_zipfile(path):
        return (Item(info.filename, info.file_size, str(path), -1) for info in _zip(str(path)).infolist()
                if not info.is_dir())
    return _of_tar(path)


def by_class(found: Iterable[Item]) -> Classes:
    """Images by the folder that they are in, or by the one above it if that is called images; "" for those in none.
    What is hidden is left out."""
    classes: Classes = {}
    for item in found:
        folder, _, name = item.name.removeprefix("./").rpartition("/")
        own = folder.removesuffix("/images").rpartition("/")[2]
        if f"/{item.name}".replace("/./", "/").count("/."):
            continue
        if not name:
            classes.setdefault(own, [])
        elif name.lower().endswith(_SUFFIXES):
            classes.setdefault(own, []).append(item)
    return {name: sorted(classes[name], key=lambda item: item.name) for name in sorted(classes)}


def splits(path: pathlib.Path, archives: bool = True) -> dict[str, Classes]:
    """The images of a folder that holds one folder or tar archive for each split, called as SPLITS says.

    Args:
        path: the folder.
        archives: whether archives are looked for.
    Raises:
        UserError: a split is missing, or an archive cannot be read.
    """
    return {split: by_class(items(_place(path, split, archives))) for split in SPLITS}


def check(name: str, found: dict[str, Classes]) -> None:
    """Raises UserError unless both splits have images of the same classes."""
    for split, classes in found.items():
        if "" in classes or not classes:
            raise UserError(f"{name}: {split} has images in no class folder, or none: expected a folder for each "
                            "class, with its images")
        if empty := [of for of, images in classes.items() if not images]:
            raise UserError(f"{name}: class {empty[0]!r} has no {split} images ({', '.join(_SUFFIXES)})")
    train, test = (set(found[split]) for split in SPLITS)
    if train != test:
        odd = min(train ^ test)
        has, lacks = ("train", "test") if odd in train else ("test", "train")
        raise UserError(f"{name}: {len(train)} classes of train images and {len(test)} of test images do not agree: "
                        f"{has} has {odd!r}, which {lacks} lacks")


def check_counts(name: str, found: dict[str, Classes], official: dict[str, int], allow_unknown: bool) -> None:
    """Raises UserError for another number of images than the official one, or warns."""
    for split, classes in found.items():
        count = sum(map(len, classes.values()))
        if count != official[split]:
            text = f"{name} has {count:,} {split} images, expected {official[split]:,}"
            if not allow_unknown:
                raise UserError(f"{text}: fetch what is missing, or accept it by --allow-unknown-hash")
            _log.warning("%s: accepted", text)


def _place(path, split, archives):
    """The folder or archive of a split."""
    for name in SPLITS[split]:
        found = sorted(path.glob(f"*{name}*.tar")) if archives else []
        if (path / name).is_dir():
            return path / name
        if len(found) > 1:
            raise UserError(f"{path} holds {found[0].name} and {found[1].name}: expected one archive of {name} images")
        if found:
            return found[0]
    names = ", ".join(f"{name}/{f' or *{name}*.tar' if archives else ''}" for name in SPLITS[split])
    raise UserError(f"no {split} images in {path}: expected {names}, with a folder for each class")


def _of_folder(path):
    for folder, folders, files in os.walk(path, followlinks=True):
        prefix = "" if folder == str(path) else f"{pathlib.Path(folder).relative_to(path).as_posix()}/"
        if prefix and not folders and not files:
            yield Item(prefix, 0, folder)
        for name in files:
            full = os.path.join(folder, name)
            yield Item(prefix + name, os.stat(full).st_size, full)


def _of_tar(path):
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".tar"):
                    folder = f"{member.name.removesuffix('.tar')}/"
                    yield Item(folder, 0, str(path))
                    with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                        for of in inner:
                            if of.isfile():
                                yield Item(folder + of.name.rpartition("/")[2], of.size, str(path),
                                           member.offset_data + of.offset_data)
                elif member.isfile():
                    yield Item(member.name, member.size, str(path), member.offset_data)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} cannot be read as a .tar archive that is not compressed ({error}): "
                        "fetch it again, or unpack it and give the folder") from None


@functools.lru_cache(maxsize=2)
def _zip(path):
    return zipfile.ZipFile(path)
