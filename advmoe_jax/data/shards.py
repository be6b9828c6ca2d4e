"""Writes image sets as `data.records` reads them.

meta.json is written last. Until then each shard has its own .json beside it, so that what was interrupted goes on after
the last whole shard.
"""

import hashlib
import io
import json
import logging
import os
import pathlib
import re
import shutil
import time

from advmoe_jax.core.errors import UserError
from advmoe_jax.core.files import write_text
from advmoe_jax.data import class_folders, records
from advmoe_jax.data.class_folders import Classes, Item
from advmoe_jax.data.source import META, SPLITS, refuse_foreign, sha256

_BYTES = 256 << 20  # images of a shard; not many more shards than files that a process may open
_OURS = re.compile(rf"\.?({META}|({'|'.join(SPLITS)})-\d{{5}}\.(array_record|json))(\.\w+)?")
_log = logging.getLogger(__name__)


def write(name: str, folder: pathlib.Path, found: dict[str, Classes] | None, again: str, force: bool = False) -> str:
    """Writes a prepared folder, or what is missing of it. Shards that are whole are kept.

    Args:
        name: of the data set.
        folder: where to write, on this machine.
        found: the images of each split; None: only look whether what is there is whole.
        again: the command that prepares it.
        force: write all shards anew.
    Returns:
        One line on what the folder holds.
    Raises:
        UserError: the folder holds other files, the disk is too small, or images cannot be read.
    """
    refuse_foreign(folder, _OURS.fullmatch)
    index = records.read_index(folder) if records.is_there(folder) and not force else None
    if found is None:
        return _verified(name, folder, index, again)
    class_folders.check(name, found)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*"):
        leftover.unlink()
    plan = {f"{split}-{number:05d}.array_record": shard for split in SPLITS
            for number, shard in enumerate(_cut(found[split]))}
    whole = {file: about for file, shard in plan.items() if (about := _whole(folder, file, shard, index)) and not force}
    if index is not None and len(whole) == len(plan) == sum(map(len, index["splits"].values())):
        return f"{folder} is already prepared: {_summary(index)}; --force writes it anew"
    _check_space(folder, [shard for file, shard in plan.items() if file not in whole])
    if whole:
        _log.info("%s: %d of %d shards are there and whole", folder, len(whole), len(plan))
    for file, about in whole.items():
        _write_about(folder, file, about)
    (folder / META).unlink(missing_ok=True)
    due = time.monotonic()
    for number, (file, shard) in enumerate(plan.items()):
        if file not in whole:
            whole[file] = _write_shard(folder, file, shard)
        if time.monotonic() >= due:
            _log.info("%s: %d of %d shards", folder, number + 1, len(plan))
            due = time.monotonic() + 5
    index = {"schema": records.SCHEMA, "name": name, "class_names": list(found["train"]), "splits": {
        split: [whole[file] for file in plan if file.startswith(f"{split}-")] for split in SPLITS}}
    write_text(folder / META, json.dumps(index) + "\n")
    for path in folder.iterdir():
        if path.name != META and path.name not in plan:
            path.unlink()
    return f"{folder}: {_summary(index)}"


def _cut(classes: Classes):
    """Yields the shards of a split: (label, image) of each."""
    shard, size = [], 0
    for label, of_class in enumerate(classes.values()):
        for item in of_class:
            shard.append((label, item))
            size += item.size
            if size >= _BYTES:
                yield shard
                shard, size = [], 0
    if shard:
        yield shard


def _digest(shard: list[tuple[int, Item]]) -> str:
    text = "\n".join(f"{label} {item.name.rpartition('/')[2]} {item.size}" for label, item in shard)
    return hashlib.sha256(text.encode()).hexdigest()


def _whole(folder, file, shard, index):
    """What is known of a shard if it is there, of these images and intact, else None."""
    known = {about["file"]: about for shards in (index["splits"].values() if index else ()) for about in shards}
    try:
        about = known.get(file) or json.loads((folder / file).with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    return about if about.get("of") == _digest(shard) and about["sha256"] == sha256(folder / file) else None


def _write_shard(folder, file, shard):
    """Writes a shard in one piece, and then what is known of it. Images that Pillow does not know are left out."""
    from array_record.python import array_record_module
    new, labels = folder / f".{file}.new", []
    writer = array_record_module.ArrayRecordWriter(str(new), "group_size:1,uncompressed")
    for label, item in shard:
        content = item.read()
        if _is_image(content):
            writer.write(content)
            labels.append(label)
        else:
            _log.warning("%s: %s is no image that can be read; left out", item.file, item.name)
    writer.close()
    with open(new, "rb+") as written:
        os.fsync(written.fileno())
    about = {"file": file, "of": _digest(shard), "bytes": records.size(new), "sha256": sha256(new), "labels": labels}
    os.replace(new, folder / file)
    _write_about(folder, file, about)
    return about


def _write_about(folder, file, about):
    write_text((folder / file).with_suffix(".json"), json.dumps(about))


def _is_image(content):
    from PIL import Image
    try:
        with Image.open(io.BytesIO(content)):
            return True
    except Exception:  # as in images: there is no common base class
        return False


def _check_space(folder, shards):
    needed = sum(item.size + 64 for shard in shards for _, item in shard)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} needs {needed / 1e9:.3g} GB more and the disk has {free / 1e9:.3g} GB free: "
                        "choose another --out, or make room")


def _verified(name, folder, index, again):
    if index is None:
        raise UserError(f"no prepared {name} in {folder}, and no --raw to prepare it from; run `{again}`")
    damaged = [shard["file"] for shards in index["splits"].values() for shard in shards
               if sha256(folder / shard["file"]) != shard["sha256"]]
    if damaged:
        raise UserError(f"{folder}: {len(damaged)} shards are missing or damaged, as {damaged[0]}; run `{again}`, "
                        "which keeps the others")
    return f"{folder} is already prepared: {_summary(index)}; --raw and --force write it anew"


def _summary(index):
    counts = " and ".join(f"{sum(len(shard['labels']) for shard in index['splits'][split]):,} {split}"
                          for split in SPLITS)
    return f"{counts} images, {len(index['class_names'])} classes"
