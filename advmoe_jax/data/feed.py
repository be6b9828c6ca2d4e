"""The batches of training, in the order in which a run takes them. Those that must be decoded are made ahead.

What a batch holds is a function of (seed, stream, step), whatever the number of workers and processes: a resumed run
starts at its step. B batch, of which a process makes its part.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

import jax
import numpy as np

from advmoe_jax.core import console, rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.data.split import Split

_CHUNK = 16  # images that a worker hands over at once, at most: handing over costs as much as drawing a small one
Visit = tuple[int, str]
"""(step, stream)."""


@contextlib.contextmanager
def opened(cfg: Any, seed: int, split: Split, rows: np.ndarray, visits: Callable[[int], Sequence[Visit]],
           mesh: jax.sharding.Mesh) -> Iterator[Callable[[int, str], dict[str, jax.Array]]]:
    """Gives a function (step, stream) -> the batch, as `pipeline.device_batch` gives it.

    Args:
        cfg: `config.data`: fields batch_size and, of images that are decoded, workers.
        seed: of the run.
        split: the training images.
        rows: (n,) those to draw from.
        visits: step -> what will be asked for from there on, in this order.
        mesh: of all devices.
    """
    coming = None
    with contextlib.ExitStack() as stack:

        def batch_of(step, stream):
            nonlocal coming
            if not split.decodes:
                wanted = pipeline.batch_rows(split, rows, cfg.batch_size, seed, stream, step)
                return pipeline.device_batch(mesh, split, wanted)
            if coming is None:
                coming = stack.enter_context(contextlib.closing(decoded(
                    split, rows, visits(step), batch_size=cfg.batch_size, seed=seed, workers=cfg.workers,
                    part=(jax.process_index(), jax.process_count()))))
            visit, batch = next(coming)
            if visit != (step, stream):
                raise ValueError(f"asked for {(step, stream)}, expected {visit}")
            return pipeline.on_devices(mesh, batch)

        yield batch_of


def decoded(split: Split, rows: np.ndarray, visits: Sequence[Visit], *, batch_size: int, seed: int, workers: int = 0,
            part: tuple[int, int] = (0, 1)) -> Iterator[tuple[Visit, dict[str, np.ndarray]]]:
    """Decodes the batches of `visits` in order; two batches are held ahead.

    An image that cannot be decoded is replaced by the next good one of its batch, and a warning counts them.

    Args:
        split: of images to decode.
        rows: (n,) those to draw from.
        visits: what to make.
        batch_size: B.
        seed: of the run.
        workers: processes that decode; 0: threads of this one.
        part: which part of each batch this process makes, and of how many.
    Yields:
        The visit; "image" (B / parts, S, S, 3) uint8, "label" and "index" (B / parts,) int32.
    Raises:
        UserError: grain is missing, an image cannot be read, or none of a batch can be decoded.
    """
    try:
        import grain
        from absl import flags
    except ImportError:
        raise UserError("training on images that are decoded needs grain: "
                        "run `pip install 'advmoe_jax[images]'`") from None
    flags.FLAGS.mark_as_parsed()  # grain's own, which command lines of absl would have read
    share, threads, lost = batch_size // part[1], os.cpu_count() or 1, set()
    chunk = math.gcd(share, _CHUNK)
    names = tuple(dict.fromkeys(stream for _, stream in visits))
    draws = _Draws(split, rows, names, np.array([names.index(stream) for _, stream in visits], np.uint8),
                   np.array([step for step, _ in visits], np.int32), batch_size, seed, part[0] * share, share, chunk)
    source = grain.MapDataset.range(len(visits) * share // chunk).map(draws)
    if workers:
        ahead = source.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(
            grain.MultiprocessingOptions(workers, max(2 * share // chunk // workers, 1)), _as_worker)
    else:
        ahead = source.to_iter_dataset(grain.ReadOptions(threads, max(2 * share // chunk, threads)))
    with contextlib.closing(iter(ahead.batch(share // chunk))) as batches:
        for visit, chunks in zip(visits, batches):
            batch = {name: values.reshape(share, *values.shape[2:]) for name, values in chunks.items()}
            wanted = batch.pop("wanted")
            if new := set(wanted[wanted != batch["index"]].tolist()) - lost:
                lost |= new
                console.warn(f"{split.where(min(new))} cannot be decoded, {len(lost)} images so far: others of their "
                             "batches take their places")
            yield visit, batch


@dataclasses.dataclass(frozen=True, eq=False)
class _Draws:
    """Makes the chunks of `decoded` by their number; a function that other processes get."""

    split: Split
    rows: np.ndarray
    names: tuple[str, ...]
    streams: np.ndarray
    steps: np.ndarray
    batch_size: int
    seed: int
    first: int
    share: int
    chunk: int

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        visit, place = divmod(int(number) * self.chunk, self.share)
        stream, step = self.names[self.streams[visit]], int(self.steps[visit])
        batch = pipeline.batch_indices(self.rows, self.batch_size, self.seed, stream, step)
        places = range(self.first + place, self.first + place + self.chunk)
        images, index = zip(*(self._draw(np.roll(batch, -place), stream, step) for place in places))
        index = np.array(index, np.int32)
        return {"image": np.stack(images), "label": self.split.labels[index], "index": index,
                "wanted": batch[places].astype(np.int32)}

    def _draw(self, rows, stream, step):
        """The first of the images that can be decoded, and its row."""
        for row in rows:
            image = self.split.draw(row, rng.on_host(self.seed, f"{stream}/crop", step, int(row)))
            if image is not None:
                return image, row
        raise UserError(f"none of the {len(rows)} images of a batch can be decoded, the first is "
                        f"{self.split.where(rows[0])}")


def _as_worker(*_):
    """Leaves signals to the process that it works for, and ends with it, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch():
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
