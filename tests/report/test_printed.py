"""A paper's tables in the report of a recipe: our numbers beside the paper's, and the paper's alone."""

import pytest
from fabricated import entry, workdir
from test_criteria import RATES, B, _lines

from advmoe_jax.core import recipe, status
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.recipe import Line, Printed, Recipe
from advmoe_jax.report import criteria, printed, reports, runs

A = "fgsm-0.01sd"
COLUMNS = ("benign", A, B, printed.MACS, printed.PARAMS)
LINES = (
    Line("Unpruned", "benign", {"benign": 93.24, A: 75.15, printed.MACS: 126.561}, {}, ("a",)),
    Line("CC", "benign", {"benign": 94.04, A: 74.78}), Line("CC", A, {A: 75.75}),
    Line("SR-GKP", A, {"benign": 93.83, A: 76.40, B: 44.85}, {}, ("a", "b")), Line("SR-GKP", "last", {}, {}, ("b",)),
    Line("random filters", B, {}, {}, ("late",)))


def _found(tmp_path, names=("a", "b")):
    """Runs by name; b is a point above a."""
    rates = {"a": RATES, "b": {step: tuple(rate + 0.01 for rate in of) for step, of in RATES.items()}}
    found = {}
    for name in names:
        folder = workdir(tmp_path / name, [entry(routed=False, train_seed=0)], name=name, run=name,
                         lines=_lines(rates[name]), **{"train.criteria": f"{A} {B}"})
        status.write(folder, "finished", 1)
        found[name] = runs.load(folder)
    return found


def test_ours_stand_before_the_papers(tmp_path):
    table, scores = printed.table(Printed("Table 2: R", COLUMNS, LINES, ("A note.",)), _found(tmp_path))
    assert table.title == "Table 2: R" and table.columns == ("method", "best by", *COLUMNS)
    rows = {row[:2]: row[2:] for row in table.rows}
    assert rows["Unpruned", "benign"] == ("93.00 (93.24)", "70.00 (75.15)", "31.00", "139.299 (126.561)", "5.835")
    assert rows["CC (paper's)", "benign"] == ("(94.04)", "(74.78)", "-", "-", "-")
    assert rows["SR-GKP", A][:3] == ("93.50 ± 0.71 (93.83)", "70.50 ± 0.71 (76.40)", "31.50 ± 0.71 (44.85)")
    assert rows["SR-GKP", "last"][:3] == ("94.00", "71.00", "32.00")
    assert rows["random filters", B] == ("-", "-", "-", "-", "-"), "not run yet"
    assert scores["Unpruned"] == {"benign": 0.93, A: 0.70, B: 0.32} and set(scores) == {"Unpruned", "SR-GKP"}
    assert any("images held out of training" in note for note in table.notes) and table.notes[-1] == "A note."


def test_extra_data_are_told(tmp_path):
    found = _found(tmp_path)
    folder = workdir(tmp_path / "c", [entry(routed=False)], name="c", lines=_lines(RATES),
                     **{"train.criteria": f"{A} {B}", "data.extra": "1m.npz"})
    table, _ = printed.table(Printed("Table 2: R", COLUMNS, LINES), found | {"a": runs.load(folder)})
    assert table.notes[-1].endswith("Unpruned (extra data: 1m.npz 70 %); SR-GKP (extra data: 1m.npz 70 %).")
    shown, = criteria.compared([found["b"], runs.load(folder)], {str(folder): "SR-GKP"})
    assert [group.label for group in shown.groups] == ["b", "SR-GKP (extra data: 1m.npz 70 %)"]


def test_a_table_without_runs_or_criteria(tmp_path):
    lines = (Line("TMI-GKP", printed={"time": "47m"}), Line("SR-GKP", printed={"time": "3s", "type": "GK"},
                                                          ours={"type": "GK"}))
    table, scores = printed.table(Printed("Table 7", ("time", "type"), lines), {})
    assert table.rows == [("TMI-GKP (paper's)", "(47m)", "-"), ("SR-GKP", "(3s)", "GK (GK)")] and scores == {}


def test_measurements_of_the_best_checkpoint(tmp_path):
    """By the name of the attack; of several sets of images the largest."""
    found = {}
    for name, ra in (("a", 0.4), ("b", 0.5)):
        entries = [entry(which, ra=ra - drop, n=n, routed=False) | {"attack": "standard"}
                   for which, drop in (("best", 0), ("last", 0.2)) for n in (200, 100)]
        found[name] = runs.load(workdir(tmp_path / name, [*entries, entry(ra=0.9, routed=False)]))
    lines = (Line("HYDRA", printed={"SA": 76.74, "RA by standard": 43.34}, runs=("a", "b")), Line("late", runs=("c",)))
    table, _ = printed.table(Printed("APB", ("SA", "RA by standard", "RA by apgd", printed.MACS, printed.TOTAL), lines),
                             found)
    assert table.rows == [("HYDRA", "80.00 ± 0.00 (76.74)", "45.00 ± 7.07 (43.34)", "-", "139.299", "140.304"),
                          ("late", "-", "-", "-", "-", "-")]
    assert table.columns[0] == "method" and "best by" not in table.columns


def test_mean_ranks_in_columns_and_over_all(tmp_path):
    """Among those that were measured in a column; of all columns only where each is known."""
    lines = [Line(label, column, {column: rank} if rank else {}, {}, names) for label, column, rank, names in (
        ("CC", "R32", 1, ()), ("SR-GKP", "R32", 2.75, ("b",)), ("SFP", "R32", 7.5, ("a",)),
        ("CC", "R56", 3.5, ()), ("SR-GKP", "R56", 2.25, ("a",)), ("SFP", "R56", 5, ("b",)),
        ("CC", "all", 3.42, ()), ("SR-GKP", "all", 2.33, ()), ("SFP", "all", 5.17, ()))]
    of = Printed("Table 20", ("R32", "R56", "all"), tuple(lines), is_of_ranks=True)
    table, _ = printed.table(of, _found(tmp_path))
    assert table.rows == [("CC (paper's)", "(1)", "(3.5)", "(3.42)"), ("SR-GKP", "1 (2.75)", "2 (2.25)", "1.5 (2.33)"),
                          ("SFP", "2 (7.5)", "1 (5)", "1.5 (5.17)")]
    table, _ = printed.table(of, {})
    assert table.rows[1] == ("SR-GKP", "- (2.75)", "- (2.25)", "- (2.33)")


def test_the_report_of_a_recipe_has_them_first(tmp_path):
    _found(tmp_path)
    chosen = Recipe({"a": None, "b": None}, "Tables", tables=(Printed("Table 2: R", COLUMNS, LINES[:4]),))
    recipe.write(chosen, tmp_path)
    assert recipe.read(tmp_path)["tables"][0].lines[3] == LINES[3]
    reports.write([tmp_path])
    text = (tmp_path / "report.md").read_text()
    assert text.index("### Table 2: R") < text.index("### pgd-20")
    assert "![superscores](table0.png)" in text and (tmp_path / "table0.png").exists() and "criteria.png" not in text


def test_a_line_names_runs_of_the_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from advmoe_jax.core import config as configs\n"
                    "from advmoe_jax.core.recipe import Line, Printed, Recipe\n"
                    "def get_recipe():\n"
                    "    table = Printed('Table 1', ('benign',), (Line('SR-GKP', 'benign', runs=('srgpk',)),))\n"
                    "    return Recipe({'srgkp': configs.default(data='digits')}, tables=(table,))\n")
    with pytest.raises(UserError, match="unknown run in the tables of .*'srgpk'.*did you mean 'srgkp'"):
        recipe.load(str(path))
