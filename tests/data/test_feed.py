"""Batches that are decoded ahead: the same whoever decodes them, and nobody is left behind."""

import itertools
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("grain")
pytest.importorskip("array_record")
import pictures  # beside this file

from advmoe_jax.core import mesh as meshes
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import feed, images, pipeline, prepare
from advmoe_jax.data.split import Arrays, Rows

ROWS = np.arange(1, 12)  # of twelve
VISITS = [(step, stream) for step in range(3) for stream in ("lower", "upper") if step != 1 or stream == "upper"]
FIELDS = dict(batch_size=4, seed=5)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare("imagefolder:set", str(folder / "out"), str(pictures.tree(folder / "raw")))
    return pipeline.open_dataset("imagefolder:set", str(folder / "out"), view=dict(
        image_size=12, resize=14, crop="resized", scale=0.08, workers=0)).train


@pytest.fixture(scope="module")
def batches(train):
    return dict(feed.decoded(train, ROWS, VISITS, **FIELDS))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for visit, batch in expected.items():
        assert found[visit].keys() == batch.keys() == {"image", "label", "index"}
        for name in batch:
            np.testing.assert_array_equal(found[visit][name], batch[name], str((visit, name)))


def test_batches(train, batches):
    """Of the rows that the step has, each drawn for the step."""
    assert list(batches) == VISITS
    for (step, stream), batch in batches.items():
        np.testing.assert_array_equal(batch["index"], pipeline.batch_indices(ROWS, 4, 5, stream, step))
        np.testing.assert_array_equal(batch["label"], train.labels[batch["index"]])
        assert batch["image"].shape == (4, 12, 12, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == batch["index"].dtype == np.int32
    seen = {}
    for batch in batches.values():
        for row, image in zip(batch["index"], batch["image"]):
            seen.setdefault(int(row), []).append(image.tobytes())
    assert any(len(drawn) > 1 for drawn in seen.values())
    assert all(len(set(drawn)) == len(drawn) for drawn in seen.values()), "a row is drawn anew in each step and stream"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers, train, batches):
    before = {*multiprocessing.active_children()}
    visits = VISITS + [(step, "lower") for step in range(3, 10**4)]
    coming = feed.decoded(train, ROWS, visits, workers=workers, **FIELDS)
    assert_same(dict(itertools.islice(coming, len(VISITS))), batches)
    assert len({*multiprocessing.active_children()} - before) == workers
    coming.close()
    assert not {*multiprocessing.active_children()} - before, "they end with what asks for them"


def test_processes_make_their_parts(train, batches):
    halves = [dict(feed.decoded(train, ROWS, VISITS, part=(i, 2), **FIELDS)) for i in range(2)]
    assert_same({visit: {name: np.concatenate([half[visit][name] for half in halves]) for name in batch}
                 for visit, batch in batches.items()}, batches)


def test_a_resumed_run_starts_at_its_step(train, batches):
    assert_same(dict(feed.decoded(train, ROWS, VISITS[3:], **FIELDS)), {visit: batches[visit] for visit in VISITS[3:]})


def test_a_part_of_a_split(train, batches):
    part = Rows(train, np.arange(len(train))[::-1])
    found = dict(feed.decoded(part, len(train) - 1 - ROWS, VISITS[:1], **FIELDS))
    np.testing.assert_array_equal(found[VISITS[0]]["label"], batches[VISITS[0]]["label"])
    assert part.where(0) == train.where(len(train) - 1)


class Damaged(list):
    """A store in which some images cannot be decoded."""

    def read(self, number):
        return self[number]

    def where(self, number):
        return f"image {number}"


def _damaged(*bad):
    files = [b"no image" if number in bad else pictures.jpeg(number) for number in range(12)]
    return images.Images(Damaged(files), np.arange(12, dtype=np.int32), np.arange(12), images.Config(12, 14))


def test_images_that_cannot_be_decoded_are_replaced_and_counted(capsys):
    whole, damaged = (dict(feed.decoded(_damaged(*bad), ROWS, VISITS, **FIELDS)) for bad in ((), (3, 4, 9)))
    replaced = 0
    for visit, batch in whole.items():
        index, found = batch["index"], damaged[visit]
        good = ~np.isin(index, (3, 4, 9))
        for name in batch:
            np.testing.assert_array_equal(found[name][good], batch[name][good])
        for place in np.flatnonzero(~good):
            following = next(row for row in np.roll(index, -place) if row not in (3, 4, 9))
            assert found["index"][place] == found["label"][place] == following
            replaced += 1
    told = capsys.readouterr().err
    assert replaced > 1 and "cannot be decoded, 3 images so far: others of their batches take their places" in told
    assert 1 <= told.count("\n") <= 3


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_to_replace_them(workers):
    with pytest.raises(UserError, match="none of the 4 images of a batch can be decoded, the first is image"):
        list(feed.decoded(_damaged(*range(12)), ROWS, VISITS, workers=workers, **FIELDS))


def test_what_is_asked_for_is_what_comes(train, batches):
    cfg, mesh, starts = pipeline.Config(batch_size=4), meshes.make(), []
    object.__setattr__(cfg, "workers", 0)

    def visits(first):
        starts.append(first)
        return [visit for visit in VISITS if visit[0] >= first]

    for split in (train, Arrays(train.take(np.arange(12))["image"], train.labels)):
        with feed.opened(cfg, 5, split, ROWS, visits, mesh) as batch_of:
            for visit in VISITS[2:4]:
                batch = batch_of(*visit)
                np.testing.assert_array_equal(batch["index"], batches[visit]["index"])
                assert isinstance(batch["image"], jax.Array) and batch["image"].sharding.is_equivalent_to(
                    meshes.by_example(mesh), 4)
                assert (np.asarray(batch["image"]) == batches[visit]["image"]).all() == (split is train)
    assert starts == [1], "a split in memory is not read ahead"
    with feed.opened(cfg, 5, train, ROWS, visits, mesh) as batch_of:
        with pytest.raises(ValueError, match="asked for"):
            batch_of(1, "lower")


OWNER = """
import multiprocessing, os, sys
sys.path.insert(0, {tests!r})

if __name__ == "__main__":
    import test_feed
    visits = [(step, "s") for step in range(10**4)]
    coming = test_feed.feed.decoded(test_feed._damaged(), test_feed.ROWS, visits, workers=1, **test_feed.FIELDS)
    next(coming)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(OWNER.format(tests=str(pathlib.Path(__file__).parent)))
    with open(tmp_path / "out", "w+") as out:  # no pipe, which the workers would hold open
        subprocess.run([sys.executable, script], stdout=out, stderr=subprocess.DEVNULL, timeout=300, env=os.environ | {
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2])})
    pids = [int(pid) for pid in (tmp_path / "out").read_text().split()]
    assert pids
    for _ in range(200):
        if not any(map(_lives, pids)):
            return
        time.sleep(0.05)
    raise AssertionError(f"{pids} live on")


def _lives(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
