"""ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation images, 1,000 classes in the order of WordNet ids.

Russakovsky et al., IJCV 2015. Validation images are what is tested on. It is prepared from the official archives,
ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or from class folders.
"""

import io
import pathlib
import tarfile

from advmoe_jax.core.errors import UserError
from advmoe_jax.data import class_folders, images, records
from advmoe_jax.data.class_folders import Classes
from advmoe_jax.data.source import Dataset, Known, refuse_variant

Config, check, KNOWN = images.Config(), images.check, Known(1000)

_COUNTS = {"train": 1_281_167, "test": 50_000}
_DEVKIT, _TRUTH, _META = "ILSVRC2012_devkit_t12", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def dataset(root: str, variant: str = "") -> Dataset:
    """Opens ROOT/imagenet/, which `python -m advmoe_jax.data.prepare imagenet` writes."""
    refuse_variant("imagenet", variant)
    return records.read("imagenet", root, Config)


def raw_images(path: pathlib.Path, variant: str, allow_unknown: bool) -> dict[str, Classes]:
    """What `data.prepare` reads: see `class_folders.splits`. Validation images in no class folders have their classes
    from the development kit.

    Args:
        path: the folder with the archives or the folders train and val.
        variant: must be empty.
        allow_unknown: accept other numbers of images than the official ones.
    Raises:
        UserError: something is missing, or of another number.
    """
    refuse_variant("imagenet", variant)
    found = class_folders.splits(path)
    if set(found["test"]) == {""}:
        found["test"] = _by_truth(path, found["test"][""])
    class_folders.check_counts("imagenet", found, _COUNTS, allow_unknown)
    return found


def _by_truth(path, items):
    """Validation images, which are numbered, by the classes that the development kit gives them in turn."""
    from scipy import io as scipy_io  # slow to import
    kit = _devkit(path)
    synsets = scipy_io.loadmat(io.BytesIO(kit[_META]), squeeze_me=True)["synsets"]
    wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if synset["num_children"] == 0}
    truth = [wnids[int(line)] for line in kit[_TRUTH].split()]
    if len(truth) != len(items):
        raise UserError(f"{_TRUTH} has {len(truth)} lines for {len(items)} validation images: expected one for each")
    classes: Classes = {}
    for wnid, item in zip(truth, items):
        classes.setdefault(wnid, []).append(item)
    return {wnid: classes[wnid] for wnid in sorted(classes)}


def _devkit(path):
    """{name: content} of its two files."""
    found, archive = {}, path / f"{_DEVKIT}.tar.gz"
    for folder in (path, path / "data", path / _DEVKIT / "data"):
        found |= {name: (folder / name).read_bytes() for name in (_TRUTH, _META) if (folder / name).is_file()}
    if archive.is_file():
        with tarfile.open(archive) as members:
            for member in members:
                if (name := member.name.rpartition("/")[2]) in (_TRUTH, _META):
                    found[name] = members.extractfile(member).read()
    if len(found) < 2:
        raise UserError(f"validation images in {path} are in no class folders: expected {_DEVKIT}.tar.gz beside them, "
                        f"or its {_TRUTH} and {_META}")
    return found
