"""Tables of several runs: what shares a row, the numbers in it, and ties."""

import pytest
from fabricated import entry, workdir

from advmoe_jax.core import tables
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import results
from advmoe_jax.report import comparison, reports, runs


def seeds(root, rates, *, name="small", **fields):
    """Runs of seeds 0, 1, ... with these robust accuracies of the best checkpoint; the last's are 0.1 lower."""
    return [workdir(
        root / f"{name}_s{seed}", [entry(which, ra=ra - drop, train_seed=seed, **fields)
                                   for which, drop in (("best", 0), ("last", 0.1))],
        name=name, seed=seed) for seed, ra in enumerate(rates)]


def compare(folders):
    return comparison.compare([runs.load(folder) for folder in folders])


def test_seeds_share_a_row(tmp_path):
    table, = compare(seeds(tmp_path, [0.40, 0.42, 0.47]))
    assert table.title == "pgd-20, linf eps 8/255, 200 test images of digits"
    assert table.rows == [("AdvMoE", "small", "3 (0, 1, 2)", "80.00 ± 0.00", "43.00 ± 3.61", "33.00 ± 3.61",
                           "not measured", "139.30 / 1.00 / 140.30")]
    assert not any("Best RA" in note for note in table.notes)


def test_the_adaptive_suite_beside_pgd(tmp_path):
    """The mean over the seeds it was run on; nothing for dense networks."""
    folders = [*seeds(tmp_path, [0.40, 0.42]), *seeds(tmp_path, [0.2], name="dense", routed=False)]
    for folder, ra in zip(folders, (0.3, 0.34)):
        results.add(folder, [entry(train_seed=int(ra > 0.3)) | {"attack": "adaptive", "ra": ra}])
    tables = {table.title.split(",")[0]: table for table in compare(folders)}
    assert [row[6] for row in tables["pgd-20"].rows] == ["32.00 ± 2.83", "-"]
    assert runs.ADAPTIVE not in tables["adaptive"].columns


def test_one_seed_has_no_deviation(tmp_path):
    table, = compare(seeds(tmp_path, [0.4]))
    assert table.rows[0][2:6] == ("1 (0)", "80.00", "40.00", "30.00")


def test_a_tie_and_a_difference(tmp_path):
    folders = [*seeds(tmp_path, [0.40, 0.42]), *seeds(tmp_path, [0.44, 0.46], name="dense", routed=False),
               *seeds(tmp_path, [0.2], name="weak", routed=False, method="natural Dense")]
    table, = compare(folders)
    assert [row[1] for row in table.rows] == ["dense", "small", "weak"]
    said = table.notes[-1]
    low, high = comparison.wilson(90, 200)
    assert f"Best RA: AT(Dense) by trades, 45.00 [{100 * low:.2f}, {100 * high:.2f}]" in said
    assert "a tie with AdvMoE:" in said and "natural" not in said


def test_no_tie(tmp_path):
    table, = compare([*seeds(tmp_path, [0.6]), *seeds(tmp_path, [0.3], name="dense", routed=False)])
    assert "Best RA: AdvMoE, " in table.notes[-1] and "no other interval overlaps" in table.notes[-1]


def test_more_seeds_are_not_more_images(tmp_path):
    few = compare([*seeds(tmp_path / "few", [0.40]), *seeds(tmp_path / "few", [0.47], name="dense", routed=False)])
    many = compare([*seeds(tmp_path / "many", [0.40] * 5),
                    *seeds(tmp_path / "many", [0.47] * 5, name="dense", routed=False)])
    assert "a tie with" in few[0].notes[-1] and "a tie with" in many[0].notes[-1]


def test_other_settings_are_other_rows(tmp_path):
    folders = seeds(tmp_path, [0.4]) + [workdir(
        tmp_path / "slow", [entry(train_seed=1)], seed=1, **{"optim.backbone.learning_rate": 0.05})]
    table, = compare(folders)
    assert sorted(row[1] for row in table.rows) == [
        "small optim.backbone.learning_rate=0.05", "small optim.backbone.learning_rate=0.1"]
    assert "AdvMoE (small optim.backbone.learning_rate=" in table.notes[-1]


def test_the_same_seed_counts_once(tmp_path):
    first, = seeds(tmp_path / "a", [0.4])
    copy, = seeds(tmp_path / "b", [0.5])
    table, = compare([first, copy])
    assert table.rows[0][2:5] == ("1 (0)", "80.00", "40.00")


def test_other_attacks_are_other_tables(tmp_path):
    folder = workdir(tmp_path, [entry(), entry(attack="fgsm"), entry(eps="4/255", eps_value=4 / 255)])
    assert [table.title for table in compare([folder])] == [
        "pgd-20, linf eps 4/255, 200 test images of digits", "fgsm, linf eps 8/255, 200 test images of digits",
        "pgd-20, linf eps 8/255, 200 test images of digits"]


def test_missing_checkpoints_and_runs(tmp_path):
    folders = seeds(tmp_path, [0.4, 0.5])
    only_last = workdir(tmp_path / "c", [entry("last", train_seed=2)], seed=2)
    waiting = workdir(tmp_path / "d", [], name="later")
    table, rest = compare([*folders, only_last, waiting])
    assert table.rows[0][2] == "3 (0, 1, 2)" and table.rows[0][4] == "45.00 ± 7.07 (2 of 3)"
    assert rest.rows == [(str(waiting), "later", "not evaluated yet")]


def test_optimistic_selection_is_said(tmp_path):
    table, = compare(seeds(tmp_path, [0.4, 0.5], selected_on="test"))
    assert any(note.startswith("Optimistic") for note in table.notes)


def test_markdown_to_a_file_and_rich_to_a_terminal(tmp_path, capsys, monkeypatch):
    (tmp_path / "notes").mkdir()
    folders = [*seeds(tmp_path, [0.4, 0.42]), tmp_path / "notes"]
    reports.write(folders)
    text = capsys.readouterr().out
    assert text.startswith("### pgd-20") and "| AdvMoE | small  | 2 (0, 1) |" in text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    reports.write(folders)
    drawn = capsys.readouterr().out
    assert "41.00 ± 1.41" in drawn and "|" not in drawn and "───" in drawn


def test_no_run_among_the_folders(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        reports.write([tmp_path, tmp_path])


def test_cells_are_escaped():
    table = tables.Table("t", ("a|b",), [("[red]x|y",)])
    assert r"| a\|b      |" in tables.markdown(table) and r"| [red]x\|y |" in tables.markdown(table)


def test_rows_are_keyed_by_fields_and_not_by_names(tmp_path):
    """Two folders of one experiment would else be two rows, and two experiments of one name a single one."""
    same = [workdir(tmp_path / name, [entry(train_seed=seed)], name=name, seed=seed, file="configs/small.py")
            for seed, name in enumerate(("first", "second"))]
    table, = compare(same)
    assert [row[1:3] for row in table.rows] == [("small", "2 (0, 1)")]
    other = workdir(tmp_path / "third", [entry(train_seed=2)], name="first", seed=2, file="configs/small.py",
                    **{"train.length": "3 epochs"})
    table, = compare([*same, other])
    assert sorted(row[1:3] for row in table.rows) == [
        ("small train.length=100 epochs", "2 (0, 1)"), ("small train.length=3 epochs", "1 (2)")]
    argument = workdir(tmp_path / "fourth", [entry(train_seed=3)], seed=3, argument="at_moe")
    table, = compare([*same, argument])
    assert sorted(row[1:3] for row in table.rows) == [("small", "2 (0, 1)"), ("small:at_moe", "1 (3)")]


def test_extra_data_are_a_track_of_their_own(tmp_path):
    """Its rows are named so, with a label and without, and a note below says it; a tie names them too."""
    fields = {"data.extra": "data/1m.npz", "data.extra_share": 0.7}
    mark = "(extra data: 1m.npz 70 %)"
    plain = workdir(tmp_path / "plain", [entry(ra=0.42, routed=False)], name="plain")
    more = workdir(tmp_path / "more", [entry(ra=0.44, routed=False, method=f"AT(Dense) by trades {mark}")],
                   name="more", **fields)
    for labels, names in (({}, ["AT(Dense) by trades", "AT(Dense) by trades"]),
                          ({str(plain): "AT", str(more): "AT"}, ["AT", "AT"])):
        table, = comparison.compare([runs.load(folder) for folder in (plain, more)], labels)
        assert [row[0] for row in table.rows] == [f"{names[0]} {mark}", names[1]]
        assert f"Best RA: {names[0]} {mark}" in table.notes[-2] and f"a tie with {names[1]}" in table.notes[-2]
        assert table.notes[-1] == f"A track of its own, trained on more than the data set's images: {names[0]} {mark}."
    table, = compare([plain])
    assert not any("track" in note for note in table.notes)
    reports.write([workdir(tmp_path / "new", [], name="new", **fields)])
    assert (tmp_path / "new" / "report.md").read_text().startswith(f"# new {mark}\n")
