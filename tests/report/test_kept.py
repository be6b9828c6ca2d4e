"""What the runs of a pool keep of each layer, in the report of their recipe."""

import json

import pytest
from fabricated import entry, workdir

from advmoe_jax.core import config as configs
from advmoe_jax.core import recipe
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.report import reports

KEPT = {"nis-1": {"conv1": [9, 10], "linear": [1, 90]}, "erm-1": {"conv1": [2, 10], "linear": [8, 90]},
        "ase-1": {"conv1": [0, 10], "linear": [10, 90]}}
TEAMS = {"eed": ["nis-1", "erm-1"], "drawn": ["nis-1", "erm-1"], "other": ["erm-1", "ase-1"]}


@pytest.fixture
def root(tmp_path):
    """A finished recipe of three pruned runs and three teams, two of which come from one pool."""
    recipe.write(Recipe({name: configs.default() for name in (*KEPT, *TEAMS)}, "A pool"), tmp_path)
    for name, weights in KEPT.items():
        workdir(tmp_path / name, [entry(routed=False)], name=name)
        (tmp_path / name / "pruning.json").write_text(json.dumps({"method": "given", "layers": {}, "weights": weights}))
    for name, pool in TEAMS.items():
        workdir(tmp_path / name, [entry(routed=False)], name=name)
        team = {"rule": {}, "pool": [{"name": f"runs/{of}", "run": of} for of in pool], "team": [0, 1]}
        (tmp_path / name / "team.json").write_text(json.dumps(team))
    return tmp_path


def _report(root):
    reports.write([root])
    return (root / "report.md").read_text()


def test_each_pool_once(root):
    text = _report(root)
    head, shown = text.split("### Kept weights of each layer, pool of eed")
    shown, other = shown.split("### Kept weights of each layer, pool of other")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in shown.splitlines() if line[:1] == "|"]
    assert rows[0] == ["layer", "weights", "nis-1", "erm-1"]
    assert rows[2:] == [["conv1", "10", "90.00", "20.00"], ["linear", "90", "1.11", "8.89"],
                        ["all", "100", "10.00", "10.00"]]
    assert "eed, drawn are chosen from this pool" in shown and "other is chosen" in other and "0.00" in other
    for name in ("kept.png", "kept1.png"):
        assert f"]({name})" in text and (root / name).read_bytes().startswith(b"\x89PNG")
    assert "Kept weights" not in head and not (root / "kept2.png").exists()


def test_runs_that_do_not_say_what_they_keep(root):
    (root / "ase-1" / "pruning.json").write_text(json.dumps({"method": "given", "layers": {}}))
    (root / "nis-1" / "pruning.json").unlink()
    assert "Kept weights" not in _report(root) and not list(root.glob("kept*"))


@pytest.mark.parametrize("path", ["nis-1/pruning.json", "eed/team.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"pool": 3}', '{"pool": [3]}'])
def test_a_damaged_file_is_one_line(root, path, content):
    (root / path).write_text(content)
    with pytest.raises(UserError, match=r"\.json is damaged: expected what a run of system\.name=\w+ writes") as error:
        reports.write([root])
    assert "\n" not in str(error.value)
