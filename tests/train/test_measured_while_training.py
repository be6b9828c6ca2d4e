"""What is measured beside the choice of the best checkpoint: also before the first step, once, and choosing nothing.

The system has no steps, so that nothing is compiled but the count of iterations.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.data.split import Arrays
from advmoe_jax.train import checkpoint, log, loop
from advmoe_jax.train.state import State
from advmoe_jax.train.system import System

TOTAL, COUNT = 6, 32
RATES, ACCURACIES = ((0.9, 0.9), (0.3, 0.5), (0.4, 0.6), (0.2, 0.9)), (0.8, 0.7, 0.1, 0.6)


class _Model:
    progress = staticmethod(lambda means: "")


class Killed(BaseException):
    """As a process that is gone: nothing in the package may catch it."""


def _train(workdir, rates, accuracies, length=TOTAL, kill_at=None, first_best=0, criteria="fgsm"):
    config = configs.default(data="digits", system="standard")
    configs.override_all(config, ["data.batch_size=16", f"train.length={length} steps", "train.eval_every=2 steps",
                                  "train.save_every=3 steps", f"train.criteria={criteria}", "model.num_experts=1"])

    def killed(state):
        if int(state.step) == kill_at:
            raise Killed
        return state

    def init(key):
        return State(jnp.zeros((), jnp.int32), {"group": {"w": jnp.ones(3)}}, {"group": {}}, {"group": {}})

    rates, accuracies = iter(rates), iter(accuracies)
    workdir.mkdir(exist_ok=True)
    split = Arrays(np.zeros((COUNT, 8, 8, 1), np.uint8), np.zeros(COUNT, np.int32))
    system = System(init, (), length, np.arange(COUNT), _Model, "", {"1 steps": killed}, first_best)
    measured = (lambda state: {"images": 5, "accuracy/fgsm": next(accuracies)}) if criteria else None
    loop.run(config, workdir, system, split, lambda state: next(rates), meshes.make(), measured)
    assert not [*rates, *accuracies], "as often as was expected"


def _measured(workdir):
    return [(r["step"], r["ra"], r.get("accuracy/fgsm")) for r in log.Metrics(workdir / "metrics.jsonl").read()
            if r["split"] == "validation"]


def _best(workdir):
    with checkpoint.opened(workdir) as saved:
        return saved.steps("best")


def test_criteria_are_measured_before_the_first_step_too_and_choose_nothing(tmp_path, capsys):
    _train(tmp_path, RATES, ACCURACIES)
    assert _measured(tmp_path) == [(0, 0.9, 0.8), (2, 0.3, 0.7), (4, 0.4, 0.1), (6, 0.2, 0.6)]
    assert _best(tmp_path) == [4]
    assert "step 0: validation SA 90.00 %, RA 90.00 % by pgd(num_steps=10); fgsm 80.00 %\n" in capsys.readouterr().out
    _train(tmp_path, (), ())


def test_without_criteria_nothing_is_measured_before_the_first_step(tmp_path):
    _train(tmp_path, RATES[1:], (), criteria="")
    assert _measured(tmp_path) == [(2, 0.3, None), (4, 0.4, None), (6, 0.2, None)] and _best(tmp_path) == [4]


def test_a_run_killed_before_its_first_save_measures_the_beginning_once(tmp_path):
    with pytest.raises(Killed):
        _train(tmp_path, RATES[:1], ACCURACIES[:1], kill_at=1)
    assert _measured(tmp_path) == [(0, 0.9, 0.8)]
    with pytest.raises(Killed):
        _train(tmp_path, RATES[:3], ACCURACIES[:3], kill_at=5)
    _train(tmp_path, ((0.45, 0.6), (0.2, 0.9)), (0.5, 0.6))
    assert _measured(tmp_path) == [(0, 0.9, 0.8), (2, 0.3, 0.7), (4, 0.45, 0.5), (6, 0.2, 0.6)]


def test_what_is_not_pruned_yet_is_not_measured(tmp_path):
    _train(tmp_path, RATES[2:], ACCURACIES[2:], first_best=3)
    assert [step for step, *_ in _measured(tmp_path)] == [4, 6]


def test_a_run_without_steps_is_measured_once_and_kept(tmp_path):
    """However often it is started."""
    _train(tmp_path, RATES[:1], ACCURACIES[:1], length=0)
    _train(tmp_path, (), (), length=0)
    assert _measured(tmp_path) == [(0, 0.9, 0.8)] and _best(tmp_path) == [0]
