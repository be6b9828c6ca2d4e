"""The report of a recipe: rows over seeds, a paper's numbers beside them, its runs and how far they are."""

import json
import sys

import pytest
from fabricated import entry, metrics, workdir

from advmoe_jax.core import config as configs
from advmoe_jax.core import recipe, status
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.report import reports

RATES = {"moe": (0.40, 0.42, 0.47), "dense": (0.60, 0.64)}
ROWS = {"AdvMoE, r=0.5": ("moe-s0", "moe-s1", "moe-s2"), "AT(Dense)": ("dense-s0", "dense-s1")}
PAPER = {"AdvMoE, r=0.5": {"SA": 80.15, "RA": 51.83}, "AT(Dense)": {"RA": 50.13}}


def _recipe(root, *, rows=ROWS, paper=PAPER, title="Table 1", notes=(), evaluated=RATES, more=(), **fields):
    """Finished runs of a recipe, which ROOT/recipe.json names; `more` are names of runs that have not begun."""
    names = [f"{method}-s{seed}" for method, rates in RATES.items() for seed in range(len(rates))]
    chosen = Recipe({name: configs.default() for name in (*names, *more)}, title, rows, paper, notes)
    recipe.write(chosen, root)
    for name in names:
        method, seed = name.split("-s")
        routed, found = method == "moe", []
        for which, drop in (("best", 0), ("last", 0.1)) if method in evaluated else ():
            ra = RATES[method][int(seed)] - drop
            found.append(entry(which, ra=ra, train_seed=int(seed), routed=routed))
            found.append(entry(which, ra=ra / 2, train_seed=int(seed), routed=routed, attack="fgsm"))
        workdir(root / name, found, name="table1", seed=int(seed), run=name, lines=metrics(routed), **fields)
        status.write(root / name, "finished" if found else "training", 3725)
    return root


def _report(root):
    reports.write([root])
    return (root / "report.md").read_text()


def _tables(text):
    """{title: rows} of the tables, each a list of cells without the line below the columns."""
    found, title = {}, ""
    for line in text.splitlines():
        if line.startswith("#"):
            title = line.strip("# ")
        elif line.startswith("|"):
            found.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return {title: [rows[0], *rows[2:]] for title, rows in found.items()}


PGD = "pgd-20, linf eps 8/255, 200 test images of digits"


def test_rows_are_means_over_seeds_with_the_paper_s_numbers_beside(tmp_path, capsys):
    text = _report(_recipe(tmp_path / "table1", notes=("Digits are not CIFAR-10.",)))
    assert text.startswith("# Table 1\n") and "\nDigits are not CIFAR-10.\n" in text
    shown = _tables(text)
    columns, dense, moe = shown[PGD]
    assert columns[0] == "method" and columns[-2:] == ["SA %, paper", "RA %, paper"]
    assert dense == ["AT(Dense)", "table1", "2 (0, 1)", "80.00 ± 0.00", "62.00 ± 2.83", "52.00 ± 2.83",
                     "-", "139.30 / 0.00 / 140.30", "-", "50.13"]
    assert moe == ["AdvMoE, r=0.5", "table1", "3 (0, 1, 2)", "80.00 ± 0.00", "43.00 ± 3.61", "33.00 ± 3.61",
                   "not measured", "139.30 / 1.00 / 140.30", "80.15", "51.83"]
    assert "Best RA: AT(Dense), 62.00" in text and "no other interval overlaps its own" in text
    fgsm = shown["fgsm, linf eps 8/255, 200 test images of digits"]
    assert [row[0] for row in fgsm[1:]] == ["AT(Dense)", "AdvMoE, r=0.5"] and fgsm[2][4] == "21.50 ± 1.80"
    printed = capsys.readouterr().out
    assert "43.00 ± 3.61" in printed and f"report: {tmp_path / 'table1' / 'report.md'}" in printed


def test_a_plot_for_each_attack(tmp_path):
    root = _recipe(tmp_path)
    text = _report(root)
    assert f"![{PGD}](rows1.png)" in text and "](rows.png)" in text
    assert sorted(path.name for path in root.glob("*.png")) == ["rows.png", "rows1.png"]
    for path in root.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    root = _recipe(tmp_path)
    assert "![" not in _report(root) and not list(root.glob("*.png"))


def test_runs_and_how_far_they_are(tmp_path):
    root = _recipe(tmp_path, evaluated=("moe",), more=("late",))
    reports.write_run(root / "moe-s1")
    shown = _tables(_report(root))
    assert shown["Runs"] == [
        ["run", "state", "time", ""], ["moe-s0", "finished", "1h02m", ""],
        ["moe-s1", "finished", "1h02m", "[report](moe-s1/report.md)"], ["moe-s2", "finished", "1h02m", ""],
        ["dense-s0", "training", "1h02m", ""], ["dense-s1", "training", "1h02m", ""], ["late", "new", "", ""]]
    assert [row[0] for row in shown[PGD][1:]] == ["AdvMoE, r=0.5"]
    assert [row[-1] for row in shown["Runs without results"][1:]] == ["not evaluated yet"] * 2


def test_nothing_is_evaluated_yet(tmp_path):
    text = _report(_recipe(tmp_path, evaluated=()))
    assert "| not evaluated yet |" in text and "| training |" in text and "![" not in text


def test_without_labels_seeds_share_a_row(tmp_path):
    shown = _tables(_report(_recipe(tmp_path, rows={}, paper={}, title="")))
    assert [row[0] for row in shown[PGD]] == ["method", "AT(Dense) by trades", "AdvMoE"]
    assert shown[PGD][0][-1].startswith("MACs") and shown[PGD][2][2] == "3 (0, 1, 2)"
    assert (tmp_path / "report.md").read_text().startswith(f"# {tmp_path.name}\n")


def test_a_label_holds_together_what_differs_in_other_fields(tmp_path):
    """Chains of runs have other sources in every seed; a table of a paper still has one row for them."""
    root = _recipe(tmp_path)
    for name in ROWS["AdvMoE, r=0.5"]:
        config = configs.read(root / name / "config.json")
        config.init_from = f"somewhere/{name}"
        configs.write(config, root / name / "config.json")
    assert _tables(_report(root))[PGD][2][2:5] == ["3 (0, 1, 2)", "80.00 ± 0.00", "43.00 ± 3.61"]


def test_it_is_made_again_after_more_was_measured(tmp_path):
    root = _recipe(tmp_path, evaluated=("moe",))
    before = _report(root)
    assert _report(root) == before and "AT(Dense)" not in before
    _recipe(root)
    after = _report(root)
    assert "| AT(Dense) " in after and [row[0] for row in _tables(after)[PGD]][1:] == ["AT(Dense)", "AdvMoE, r=0.5"]


@pytest.mark.parametrize("content", [
    "{", "[]", json.dumps({"title": "x"}), json.dumps({"tables": [3]}), json.dumps({"tables": [{"title": "x"}]})])
def test_a_damaged_recipe_is_one_line(tmp_path, content):
    root = _recipe(tmp_path)
    (root / "recipe.json").write_text(content)
    with pytest.raises(UserError, match=r"recipe\.json is damaged: expected what a recipe writes") as error:
        reports.write([root])
    assert "\n" not in str(error.value)
