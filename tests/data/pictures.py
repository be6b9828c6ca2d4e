"""Made-up image files, in class folders and archives."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

CLASSES = ("n01", "n02", "n03")
COUNTS = {"train": 4, "val": 2}
"""Images of each class."""


def pixels(seed, width=20, height=16):
    """A smooth image (height, width, 3) uint8, which JPEG keeps nearly."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def encoded(image, kind="JPEG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def jpeg(seed, **size):
    return encoded(Image.fromarray(pixels(seed, **size)))


def tree(folder, counts=COUNTS, classes=CLASSES, **size):
    """Writes FOLDER/train/n01/train_0.JPEG, ...; no two images are alike."""
    seed = 0
    for split, count in counts.items():
        for name in classes:
            place = pathlib.Path(folder) / split / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{split}_{i}.JPEG").write_bytes(jpeg(seed, **size))
                seed += 1
    return pathlib.Path(folder)


def pack(archive, folder, name=""):
    """A tar archive of a folder's content."""
    with tarfile.open(archive, "w") as out:
        out.add(folder, name)


def tiny_imagenet(folder):
    """As tiny-imagenet-200 is laid out."""
    tree(folder, {"train": 4})
    for place in (folder / "train").iterdir():
        (place / "images").mkdir()
        for image in place.glob("*.JPEG"):
            image.rename(place / "images" / image.name)
    (folder / "val/images").mkdir(parents=True)
    lines = []
    for i in range(6):
        (folder / f"val/images/val_{i}.JPEG").write_bytes(jpeg(100 + i))
        lines.append(f"val_{i}.JPEG\t{CLASSES[i % 3]}\t0\t0\t9\t9\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
