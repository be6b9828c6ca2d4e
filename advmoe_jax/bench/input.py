"""Images/s of the input of ImageNet training, stage by stage and by the number of worker processes, beside training.

Made-up JPEG files of 500x375 pixels, a size that ImageNet's often have, are cut to 224 pixels. Files are in the page
cache. Stages are of one thread. What uses them is AdvMoE with a ResNet-18 at 224 pixels on this device.
"""

import io
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from advmoe_jax.bench import train
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import class_folders, feed, images, pipeline, shards
from advmoe_jax.data.split import Split

_SIZE, _IMAGES, _BATCH, _BATCHES = (500, 375), 256, 64, 9
_WORKERS = (0, 1, 2, 4, 8, 16)
_VIEW = images.Config()
_TAKEN = 8  # images of an iteration
_MODEL = {"model__stem": "imagenet", "model__dispatch": "all", "data__batch_size": _TAKEN}


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for each stage and number of workers: images/s, the median of the rounds for stages."""
    with tempfile.TemporaryDirectory() as folder:
        split = _made(pathlib.Path(folder))
        rates = {name: _IMAGES / _median(stage, rounds) for name, stage in _stages(split).items()}
        for workers in (workers for workers in _WORKERS if workers <= (os.cpu_count() or 1)):
            rates[f"batches, {workers} workers" if workers else "batches, threads of this process"] = _ahead(
                split, workers)
    iteration = train.program("advmoe", _MODEL, (_VIEW.image_size, _VIEW.image_size, 3))
    rates["taken by AdvMoE here"] = _TAKEN / _median(lambda: jax.block_until_ready(iteration(1)), rounds)
    return [{"what": name, "images/s": rate, "ms": 1000 / rate} for name, rate in rates.items()]


def _made(folder: pathlib.Path) -> Split:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("bench input needs Pillow: run `pip install 'advmoe_jax[images]'`") from None
    numbers = np.random.default_rng(0)
    for i, place in enumerate(("train", *["train"] * (_IMAGES - 1), "val")):
        coarse = numbers.integers(0, 256, (24, 32, 3), np.uint8)  # about 60 kB, once it is enlarged
        content = io.BytesIO()
        noise = numbers.integers(-12, 13, (_SIZE[1], _SIZE[0], 3))
        smooth = np.asarray(Image.fromarray(coarse).resize(_SIZE)) + noise
        Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=80)
        file = folder / "raw" / place / "one" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.getvalue())
    shards.write("imagefolder:made", folder / "made", class_folders.splits(folder / "raw"), "")
    return pipeline.open_dataset("imagefolder:made", str(folder), view=vars(_VIEW)).train


def _stages(split: Split) -> dict[str, Callable[[], None]]:
    """What a thread does for all images."""
    files, generator = [split.store.read(row) for row in range(_IMAGES)], np.random.default_rng(0)
    batch = {"image": np.zeros((_BATCH, *split.image_shape), np.uint8)}
    mesh, whole = meshes.make(), images.Images(split.store, split.labels, split.order, images.Config(crop="pad"))

    def draw(of):
        for row in range(_IMAGES):
            of.draw(row, generator)

    def transfer():
        for _ in range(_IMAGES // _BATCH):
            jax.block_until_ready(pipeline.on_devices(mesh, batch))

    return {"read": lambda: [split.store.read(row) for row in range(_IMAGES)],
            "decode": lambda: [_decode(file) for file in files], "read, decode, random part": lambda: draw(split),
            "read, decode, centre": lambda: draw(whole), "transfer": transfer}


def _decode(file: bytes) -> None:
    from PIL import Image
    Image.open(io.BytesIO(file)).load()


def _median(action: Callable[[], Any], rounds: int) -> float:
    """Seconds, after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _ahead(split: Split, workers: int) -> float:
    """Images/s of what comes after the first batch, without the batches that were made until then."""
    visits = [(step, "bench") for step in range(_BATCHES * max(workers, 1))]
    times = [time.perf_counter() for _ in feed.decoded(split, np.arange(_IMAGES), visits, batch_size=_BATCH, seed=0,
                                                       workers=workers)]
    return (len(times) - 3) * _BATCH / (times[-1] - times[2])
