"""Answers requests in batches, and prints how long they took by the size of the batch that they were answered in.

  python launch/serve_example.py --workdir runs/digits_r18 --clients 1,8,64

The run may be an export that keeps its weights. So many clients at a time ask for one test image after the other; the
server takes all that wait, up to --most, as one batch, filled up to a power of two. Where an image makes one choice of
experts, the host sorts a batch by expert, and a team asks no more members than it needs. A server of your own has a
socket in the place of the queue.
"""

import argparse
import concurrent.futures
import queue
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from advmoe_jax.core import cache, cli, console, paths, status, tables
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.models import model as models
from advmoe_jax.train import checkpoint

Answer = Callable[[np.ndarray], np.ndarray]
"""Images (B, H, W, C) in [0, 1] -> classes (B,)."""


def load(workdir: str, which: str) -> tuple[Answer, np.ndarray, np.ndarray]:
    """What answers for a run, and the first of its test images with their labels."""
    where = paths.path(workdir)
    config = status.config_of_trained(where, f"--workdir is {workdir}")
    data = pipeline.open_dataset(config.data.name, config.data.dir, view=config.data)
    for field, value in (("dispatch", "host"), ("dispatch_members", "sequential")):
        if field in config.model:
            config.model[field] = value
    model = models.make(config.model, data.image_shape, data.num_classes)
    with checkpoint.opened(where, create=False) as saved:
        outputs_fn = model.outputs_fn(jax.device_put(saved.restore_trained(which, model.shapes).variables))
    is_on_host = getattr(model, "one_choice", False) or getattr(model, "is_sequential", False)
    outputs_fn = outputs_fn if is_on_host else jax.jit(outputs_fn)
    images, labels = pipeline.images_of(data.test, np.arange(min(len(data.test), 512)))
    console.say(" | ".join(filter(None, (f"{model.kind} of {workdir}", model.about, jax.default_backend()))))
    return lambda images: np.argmax(outputs_fn(images)[0], -1), images, labels


def answered(answer: Answer, images: np.ndarray, most: int) -> np.ndarray:
    """The classes of up to `most` images, filled up to a power of two, so that few programs are compiled."""
    full = min(1 << (len(images) - 1).bit_length(), most)
    return answer(images[np.resize(np.arange(len(images)), full)])[:len(images)]


def serve(answer: Answer, waiting: queue.SimpleQueue, most: int) -> None:
    """Answers (image, future) of a queue until None comes: a future gets the class, and the size of the batch."""
    is_open = True
    while is_open:
        batch = [waiting.get()]
        while len(batch) < most and not waiting.empty():
            batch.append(waiting.get())
        is_open = None not in batch
        batch = [request for request in batch if request is not None]
        if not batch:
            break
        images, futures = zip(*batch)
        try:
            classes = answered(answer, np.stack(images), most)
        except Exception as error:  # those who wait learn of it, and the next batch may fare better
            for future in futures:
                future.set_exception(error)
            continue
        for future, found in zip(futures, classes):
            future.set_result((int(found), len(batch)))


def ask(waiting: queue.SimpleQueue, images: np.ndarray, rows: np.ndarray) -> list[tuple[int, int, int, float]]:
    """One client's (row, class, size of the batch, seconds), one request after the other."""
    found = []
    for row in rows:
        begin, future = time.perf_counter(), concurrent.futures.Future()
        waiting.put((images[row], future))
        found.append((int(row), *future.result(), time.perf_counter() - begin))
    return found


def measure(answer: Answer, images: np.ndarray, clients: list[int], each: int, most: int) -> list:
    """What all clients found, after every program was compiled."""
    for size in sorted({min(1 << i, most) for i in range(most.bit_length() + 1)}):
        for _ in range(3):  # a host's share of an expert differs from batch to batch
            answered(answer, images[np.random.default_rng(size).integers(0, len(images), size)], most)
    waiting, found = queue.SimpleQueue(), []
    server = threading.Thread(target=serve, args=(answer, waiting, most))
    server.start()
    try:
        for count in clients:
            rows = np.arange(count * each).reshape(each, count).T % len(images)
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                for part in pool.map(lambda own: ask(waiting, images, own), rows):
                    found += part
    finally:
        waiting.put(None)
        server.join()
    return found


def table(found: list, labels: np.ndarray) -> tables.Table:
    """Latency by the size of a batch, in bins up to a power of two."""
    rows, bins = [], np.array([1 << (size - 1).bit_length() for _, _, size, _ in found])
    seconds, right = np.array([of[3] for of in found]), [labels[row] == guess for row, guess, *_ in found]
    for size in np.unique(bins):
        own = 1e3 * seconds[bins == size]
        rows.append((str(size), str(len(own)), *(tables.decimals(np.percentile(own, share)) for share in (50, 95, 99))))
    return tables.Table("Latency of a request", ("batch, up to", "requests", "median ms", "95 % ms", "99 % ms"), rows,
                        (f"{tables.percent(np.mean(right))} % of {len(found)} answers were right.",))


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and 0 < int(part) <= 1024 for part in parts):
        raise UserError(f"--clients is {text!r}: expected numbers from 1 to 1024, with commas, such as 1,8,64")
    return list(map(int, parts))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    parser = cli.Parser(prog="python launch/serve_example.py", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a finished run, or of an export that keeps its weights")
    parser.add_argument("--checkpoint", default="best", help="best, last, ema or a step; best")
    parser.add_argument("--clients", default="1,8,64", metavar="N,N", help="at a time, one number after the other")
    parser.add_argument("--requests", type=int, default=50, metavar="N", help="of each client; 50")
    parser.add_argument("--most", type=int, default=64, metavar="N", help="images in a batch, at most; 64")

    def run():
        args = parser.parse_args(argv)
        clients = _counts(args.clients)
        for name in ("requests", "most"):
            if not 0 < getattr(args, name) <= 65536:
                raise UserError(f"--{name} is {getattr(args, name)}: expected 1 to 65536")
        cache.use()
        answer, images, labels = load(args.workdir, args.checkpoint)
        tables.show([table(measure(answer, images, clients, args.requests, args.most), labels)])

    return cli.ending(run)


if __name__ == "__main__":
    sys.exit(main())
