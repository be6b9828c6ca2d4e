"""Best evaluations by each criterion, superscores and mean ranks, from records as training writes them."""

import sys

import numpy as np
import pytest
from fabricated import entry, workdir

from advmoe_jax.core import recipe, status
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.report import criteria, reports, runs

A, B = "fgsm-0.01sd", "pgd-3-8/255sd"
RATES = {0: (0.30, 0.20, 0.05), 10: (0.92, 0.70, 0.30), 20: (0.93, 0.69, 0.32), 30: (0.93, 0.70, 0.31)}
"""{step: benign, A, B} of a run; benign has a tie, and so has A."""


def _lines(rates=RATES, split="validation", images=500, names=(A, B)):
    for step, (sa, *attacked) in rates.items():
        if step:
            yield {"step": step, "split": "train", "epoch": step / 10, "train/loss": 1.0}
        yield {"step": step, "split": split, "sa": sa, "ra": attacked[0] / 2, "images": images,
               **{f"accuracy/{name}": rate for name, rate in zip(names, attacked)}}


def _run(folder, rates=RATES, entries=(), **fields):
    split = fields.get("train.select_on", "validation")
    return workdir(folder, entries, lines=_lines(rates, split), **{"train.criteria": f"{A} {B}"} | fields)


def test_the_best_evaluation_of_each_criterion_is_one_evaluation(tmp_path):
    """With all its numbers; of equal ones the last."""
    run = runs.load(_run(tmp_path))
    found = criteria.evaluations(run)
    assert [(of.step, of.epoch) for of in found] == [(0, 0), (10, 1), (20, 2), (30, 3)]
    assert {name: criteria.best(found, name).step for name in found[0].rates} == {"benign": 30, A: 30, B: 20}
    table = criteria.run_table(run)
    assert table.columns == ("best by", "step", "epoch", "benign %", f"{A} %", f"{B} %", "RA %")
    assert table.rows == [
        ("benign", "30", "3", "93.00", "70.00", "31.00", "35.00"), (A, "30", "3", "93.00", "70.00", "31.00", "35.00"),
        (B, "20", "2", "93.00", "69.00", "32.00", "34.50"), ("superscore", "", "", "93.00", "70.00", "32.00", "")]
    assert table.title == "Best evaluation by each criterion, 500 validation images of cifar10"
    assert "images held out of training" in table.notes[0] and f"{A} {B}" in table.notes[0]


def test_a_network_that_is_best_before_it_is_trained(tmp_path):
    run = runs.load(_run(tmp_path, {0: (0.9, 0.8, 0.7), 10: (0.5, 0.4, 0.3)}))
    assert {row[1] for row in criteria.run_table(run).rows[:-1]} == {"0"}


def test_the_report_of_a_run(tmp_path):
    reports.write([_run(tmp_path / "on", entries=[entry(routed=False)], **{"train.select_on": "test"})])
    text = (tmp_path / "on" / "report.md").read_text()
    assert "## Criteria" in text and "500 test images of cifar10" in text and "test images, which is optimistic" in text
    reports.write([workdir(tmp_path / "off", [entry(routed=False)], lines=_lines(names=()))])
    assert "## Criteria" not in (tmp_path / "off" / "report.md").read_text()


def test_records_of_other_criteria_are_left_out(tmp_path):
    """Those of a run that was begun with others."""
    folder = workdir(tmp_path, [], lines=[*_lines({0: (0.9, 0.9)}, names=(A,)), *_lines({10: (0.5, 0.4, 0.3)})],
                     **{"train.criteria": f"{A} {B}"})
    assert [of.step for of in criteria.evaluations(runs.load(folder))] == [10]


def _recipe(root, methods, rows=None, **fields):
    """A recipe of runs {name: rates}."""
    for name, rates in methods.items():
        _run(root / name, rates, run=name, name=name, **fields)
        status.write(root / name, "finished", 1)
    recipe.write(Recipe({name: None for name in methods}, "Pruned", rows or {n.upper(): (n,) for n in methods}), root)
    reports.write([root])
    return (root / "report.md").read_text()


def test_a_recipe_has_the_rows_of_every_label_with_ranks_and_bars(tmp_path):
    other = {step: tuple(np.subtract(rates, (0.01, -0.01, 0.0))) for step, rates in RATES.items()}
    text = _recipe(tmp_path, {"a": RATES, "b": other})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert ["A", "benign", "1", "93.00", "70.00", "31.00"] in rows and ["B", B, "1", "92.00", "70.00", "32.00"] in rows
    assert ["A", "1.5", "93.00", "70.00", "32.00"] in rows and ["B", "1.5", "92.00", "71.00", "32.00"] in rows
    assert "![superscores](criteria.png)" in text and "share the mean of their ranks" in text
    assert (tmp_path / "criteria.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_one_row(tmp_path):
    other = {step: tuple(np.add(rates, 0.02)) for step, rates in RATES.items()}
    text = _recipe(tmp_path, {"a": RATES, "b": other}, {"both": ("a", "b")})
    [row] = [line for line in text.splitlines() if line.startswith("| both   | benign")]
    assert "94.00 ± 1.41" in row and "| 2 " in row and "mean rank" not in text


def test_other_images_are_another_table(tmp_path):
    for name, where in (("a", "test"), ("b", "validation")):
        _run(tmp_path / name, **{"train.select_on": where})
    found = criteria.compared([runs.load(tmp_path / name) for name in "ab"])
    assert [len(of.groups) for of in found] == [1, 1] and all(criteria.rank_table(of) is None for of in found)


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "criteria.png" not in _recipe(tmp_path, {"a": RATES, "b": RATES})


def test_mean_ranks_are_those_of_table_20():
    """SR-GKP (NeurIPS 2023): ResNet-32 at 62.5 %, superscores of table 17."""
    scores = {"CC": (92.39, 70.71, 29.07, 30.91), "DHP": (91.73, 67.71, 28.75, 26.89),
              "FPGM": (91.32, 67.77, 24.47, 26.61), "L1Norm-A": (89.96, 67.65, 23.21, 27.93),
              "L1Norm-B": (90.01, 67.14, 21.63, 27.55), "NPPM": (91.92, 67.56, 23.97, 25.91),
              "SFP": (90.28, 66.71, 20.35, 25.47), "SR-GKP": (92.21, 69.33, 23.55, 27.94)}
    ranks = dict(zip(scores, criteria.mean_ranks(list(scores.values()))))
    assert ranks == {"CC": 1, "DHP": 3.75, "FPGM": 4.25, "L1Norm-A": 5.5, "L1Norm-B": 6.25, "NPPM": 5, "SFP": 7.5,
                     "SR-GKP": 2.75}
    assert criteria.mean_ranks([(2, 1), (2, 3), (1, 0)]).tolist() == [1.75, 1.25, 3]


@pytest.mark.parametrize("scores", [[(0.5,)], [(0.5,), (0.5,)]])
def test_ranks_of_few(scores):
    assert criteria.mean_ranks(scores).tolist() == [(len(scores) + 1) / 2] * len(scores)
