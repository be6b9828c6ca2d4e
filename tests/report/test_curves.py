"""Figures over several runs, of workdirs made up from numbers."""

import json

import numpy as np
import pytest
from fabricated import entry, metrics, workdir

from advmoe_jax.core import config as configs
from advmoe_jax.core import recipe, status
from advmoe_jax.core.recipe import Line, Printed, Recipe
from advmoe_jax.report import curves, runs

EPS = {f"{n}/255": 0.9 - 0.1 * n for n in (2, 4, 8)}
SCALES = {"AdvMoE, N=2": {0.2: 0.3, 0.5: 0.4}, "AdvMoE, N=5": {0.2: 0.2, 0.5: 0.45}, "AT(Dense)": {1.0: 0.5}}


def _entry(ra, eps="8/255", **fields):
    return entry(ra=ra, eps=eps, eps_value=int(eps.split("/")[0]) / 255, **fields)


def _recipe(root, of, paper=None):
    """A recipe of runs {label: (entries, fields)} of two seeds each."""
    rows = {}
    for number, (label, (entries, fields)) in enumerate(of.items()):
        for seed in (0, 1):
            name = f"run{number}-s{seed}"
            rows.setdefault(label, []).append(name)
            workdir(root / name, [found | {"train_seed": seed, "ra": found["ra"] + 0.02 * seed} for found in entries],
                    seed=seed, run=name, lines=metrics(), **fields)
            status.write(root / name, "finished", 1)
    workdir(root / "base", [_entry(0.9)])  # that rows do not name
    recipe.write(Recipe({name: None for names in rows.values() for name in names} | {"base": None}, "Curves", rows,
                        paper or {}), root)
    return root


@pytest.fixture
def by_scale(tmp_path):
    of = {}
    for line, points in SCALES.items():
        for scale, ra in points.items():
            experts = {"AdvMoE, N=2": 2, "AdvMoE, N=5": 5}.get(line, 1)
            of[line if scale == 1 else f"{line}, r={scale}"] = [_entry(ra, routed=experts > 1), _entry(0.8, "2/255")], {
                "model.model_scale": scale, "model.num_experts": experts}
    return _recipe(tmp_path / "runs", of, {"AdvMoE, N=2, r=0.5": {"RA": 51.83, "SA": 80}, "AT(Dense)": {"RA": 50.13}})


def test_ra_against_eps(tmp_path):
    """Those that were measured at several; whatever was measured otherwise is not among them."""
    root = _recipe(tmp_path, {"A": ([_entry(ra, eps) for eps, ra in EPS.items()] + [_entry(0.1, attack="fgsm"), _entry(
        0.2, "4/255", n=50), _entry(0.05, "4/255", checkpoint="last")], {}), "B": ([_entry(0.3)], {})})
    found = curves.measure([root])
    assert found["attack"] == "pgd-20, linf, 200 test images of digits" and found["at"] == "8/255"
    assert list(found["eps"]) == ["A"] and list(found["eps"]["A"]) == [n / 255 for n in (2, 4, 8)]
    np.testing.assert_allclose(list(found["eps"]["A"].values()), [[ra, ra + 0.02] for ra in EPS.values()])
    np.testing.assert_allclose(found["overview"]["B"]["ra"], [0.3, 0.32])
    assert not found["scale"] and "base" not in found["trajectory"]
    assert curves.measure([root], "fgsm")["overview"].keys() == {"A"}


def test_ra_against_model_scale(by_scale, tmp_path):
    """A label without its scale is a line; Dense is at 1; a paper's numbers are where ours are."""
    found = curves.measure([by_scale])
    assert found["at"] == "8/255", "that of training, not the other"
    for line, points in SCALES.items():
        assert list(found["scale"][line]) == list(points)
        np.testing.assert_allclose(list(found["scale"][line].values()), [[ra, ra + 0.02] for ra in points.values()])
    assert found["paper"]["scale"] == {"AdvMoE, N=2": {0.5: 51.83 / 100}, "AT(Dense)": {1.0: 50.13 / 100}}
    _, grid, overview = curves.summary(found)
    assert grid.columns == ("line", "r = 0.2", "r = 0.5", "r = 1")
    assert grid.rows[0] == ("AdvMoE, N=2", "31.00 ± 1.41", "41.00 ± 1.41", "-")
    assert overview.rows[-1] == ("AT(Dense)", "80.00 ± 0.00", "51.00 ± 1.41", "140.30", "50.13")


def test_lines_of_a_paper_s_tables(tmp_path):
    """Rows are named by a table's title too, and its lines have what the paper prints."""
    of = {f"Figure 3: r = {r}: {label}": ([_entry(ra)], {"model.model_scale": r}) for r in (0.2, 0.5)
          for label, ra in (("M1", 0.1), ("M2", r))}
    root = _recipe(tmp_path / "runs", of)
    stored = recipe.read(root)
    line = Line("M2", printed={"RA by pgd-20": "47.68 ± 0.1", "SA": "80"}, runs=tuple(stored["rows"][[*of][-1]]))
    recipe.write(Recipe(dict.fromkeys(stored["runs"]), "", stored["rows"], tables=(
        Printed("Figure 3: r = 0.5", ("RA by pgd-20",), (line,)),)), root)
    found = curves.measure([root])
    assert list(found["scale"]) == ["M1", "M2"] and list(found["scale"]["M2"]) == [0.2, 0.5]
    assert found["paper"]["scale"] == {"M2": {0.5: 47.68 / 100}}


def test_it_is_written_and_drawn(by_scale, tmp_path, capsys):
    out = tmp_path / "out"
    assert curves.main(["--workdir", str(by_scale), "--out", str(out)]) == 0
    for name in ("eps.png", "scale.png", "overview.png", "trajectory.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "curves.json").read_text())["overview"]["AT(Dense)"]["macs"] == 140_304_328
    assert "RA against model scale" in (out / "table.md").read_text() and "trajectory.png" in capsys.readouterr().out


@pytest.mark.slow
def test_a_single_scale_is_no_curve(by_scale, tmp_path):
    (tmp_path / "scale.png").write_text("of an earlier call")
    assert curves.main(["--workdir", str(by_scale / "run0-s0"), "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "scale.png").exists() and (tmp_path / "eps.png").exists()


def test_trajectories_are_in_epochs(by_scale):
    of_label = curves.measure([by_scale])["trajectory"]["AT(Dense)"]
    assert len(of_label) == 2 and of_label[0]["on"] == "validation"
    assert of_label[0]["epochs"] == [0.5, 1, 1.5, 2]
    np.testing.assert_allclose(of_label[0]["ra"], [0.1, 0.2, 0.3, 0.4])


def test_runs_without_a_recipe_are_told_apart(tmp_path):
    for name, fields in (("a", {}), ("b", {"model.width": 32}), ("c", {})):
        workdir(tmp_path / name, [_entry(0.4, routed=name != "c")], lines=metrics(), **fields)
    found = curves.measure([tmp_path / name for name in "abc"])
    assert list(found["overview"]) == ["AdvMoE, model.width=64", "AdvMoE, model.width=32", "AT(Dense) by trades"]


def test_the_scale_of_what_was_pruned(tmp_path):
    """Of searched filters what stays, in the run that trains them too, wherever the recipe has moved."""
    searched, given = {"unit": "filter", "rate": "4/5"}, {"method": "given"}
    cases = {"search": ("mask_search", searched, 0.2), "weights": ("mask_search", searched | {"unit": "weight"}, None),
             "left": ("prune", given, 0.2), "l1norm": ("prune", {"method": "l1norm"}, None),
             "whole": ("standard", {}, 1)}
    for name, (system, fields, expected) in cases.items():
        config = configs.default()
        configs.choose(config, system=system)
        config.model.num_experts, config.model.model_scale, config.init_from = 1, 1.0, "elsewhere/search@last"
        for field, value in fields.items():
            configs.override(config, f"system.{field}={value}")
        configs.write(config, tmp_path / name / "config.json")
        assert curves.model_scale(runs.load(tmp_path / name)) == expected, name
    (tmp_path / "search" / "config.json").unlink()
    assert curves.model_scale(runs.load(tmp_path / "left")) is None


@pytest.mark.parametrize("flags, said", [
    (["--attack", "pgd-2"], "unknown attack in --attack 'pgd-2': expected"), (["--workdir", "nowhere"], "no run in"),
    (["--workdir", "{empty}"], "nothing was measured in")])
def test_bad_input_is_one_line(by_scale, tmp_path, capsys, flags, said):
    workdir(tmp_path / "empty", [])
    flags = [flag.format(empty=tmp_path / "empty") for flag in flags]
    assert curves.main(["--workdir", str(by_scale), "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in (error := capsys.readouterr().err) and error.count("\n") == 1 and not (tmp_path / "out").exists()
