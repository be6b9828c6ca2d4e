"""Logs of evaluations on disk: what goes on, what is replaced, and what is refused."""

import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import eval_log

ABOUT, OTHER = {"step": 4, "weights": "a"}, {"step": 4, "weights": "b"}


def _filled(folder, finished=False):
    log = eval_log.FileLog(folder, ABOUT)
    for number in range(2):
        log.add({"attempt": number, "passes": {}, "seconds": 0.0}, {"index": np.arange(number + 1)})
    if finished:
        (folder / "summary.json").write_text("{}")
    return log


def _held(log):
    return [(record["attempt"], len(arrays["index"])) for record, arrays in log.read()]


def test_an_unfinished_one_goes_on(tmp_path):
    _filled(tmp_path / "log")
    assert _held(eval_log.FileLog(tmp_path / "log", ABOUT)) == [(0, 1), (1, 2)]
    with pytest.raises(UserError, match="unfinished evaluation of another model"):
        eval_log.FileLog(tmp_path / "log", OTHER)
    assert _held(eval_log.FileLog(tmp_path / "log", ABOUT, writes=False)) == [(0, 1), (1, 2)]


def test_one_whose_results_were_not_all_written_goes_on(tmp_path):
    """Killed between summary.json and the index: nothing is attacked again."""
    _filled(tmp_path / "log", finished=True)
    assert _held(eval_log.FileLog(tmp_path / "log", ABOUT)) == [(0, 1), (1, 2)]


def test_what_comes_behind_a_damaged_line_is_measured_again(tmp_path):
    _filled(tmp_path / "log")
    (tmp_path / "log" / "log.jsonl").write_text('{"attempt": 0}\n{"attem\n{"attempt": 2}\n')
    log = eval_log.FileLog(tmp_path / "log", ABOUT)
    assert _held(log) == [(0, 1)]
    log.add({"attempt": 1}, {"index": np.arange(2)})
    assert _held(eval_log.FileLog(tmp_path / "log", ABOUT)) == [(0, 1), (1, 2)]


def test_damaged_arrays_and_descriptions(tmp_path):
    """Are named; a finished evaluation whose description is damaged is measured again."""
    _filled(tmp_path / "log")
    (tmp_path / "log" / "parts" / "00001.npz").write_bytes(b"PK half")
    with pytest.raises(UserError, match="00001.npz is damaged: delete .*log to measure it again"):
        _held(eval_log.FileLog(tmp_path / "log", ABOUT))
    (tmp_path / "log" / "about.json").write_text("{")
    with pytest.raises(UserError, match="delete the folder"):
        eval_log.FileLog(tmp_path / "log", ABOUT)
    (tmp_path / "log" / "summary.json").write_text("{}")
    assert not eval_log.is_about(tmp_path / "log", ABOUT)
    assert _held(eval_log.FileLog(tmp_path / "log", ABOUT)) == []


def test_a_finished_one_is_replaced(tmp_path):
    _filled(tmp_path / "log", finished=True).finish()
    assert _held(eval_log.FileLog(tmp_path / "log", ABOUT, writes=False)) == []
    assert _held(eval_log.FileLog(tmp_path / "log", ABOUT)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["about.json"]
    assert eval_log.is_about(tmp_path / "log", ABOUT) and not eval_log.is_about(tmp_path / "log", OTHER)
    assert eval_log.is_about(tmp_path / "none", ABOUT) is None
