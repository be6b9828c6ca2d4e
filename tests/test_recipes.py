"""Recipes: runs that start from others, taken in parts, by several processes at once, and reported together."""

import os
import socket

import pytest
from tiny import FIELDS, REPO, arrays, entries, listing

from advmoe_jax import main, recipes
from advmoe_jax.core import config as configs
from advmoe_jax.core import locks, recipe, status
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import flags as suspicions

pytestmark = pytest.mark.usefixtures("tiny_resnet", "unsuspicious")
FILE = """
from advmoe_jax.core import config as configs
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.systems import methods

FIELDS = {fields}


def run(seed=0, init_from="", **fields):
    config = configs.default(data="digits")
    methods.choose(config, "natural")
    config.update_from_flattened_dict(FIELDS)
    config.seed, config.init_from = seed, init_from
    for name, value in fields.items():
        configs.override(config, name.replace("__", ".") + "=" + str(value))
    return config


def get_recipe():
    team = dict(model__name="ensemble", model__num_members=2, eval__attacks="fgsm exits(num_steps=2)")
    runs = dict(a=run(0), b=run(1), bad=run(2, optim__backbone__learning_rate=1e4, optim__backbone__warmup="0%"),
                after=run(3, "bad"), further=run(4, "a"), team=run(5, "a, b@last", **team))
    return Recipe(runs, "Three and a team", rows=dict(alone=("a", "b"), team=("team",)),
                  paper=dict(alone=dict(SA=91.5, RA=12.25)), notes=("A note.",))
"""
SMALL = FIELDS | {"train.length": "2 steps", "train.eval_every": "2 steps", "eval.attacks": "fgsm", "eval.n": 8}


@pytest.fixture(scope="module")
def unsuspicious():
    """The checks of a model have tests of their own; here they would only compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suspicions, "of_model", lambda *_: ())
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "three.py"
    path.write_text(FILE.replace("{fields}", repr(SMALL)))
    return str(path)


@pytest.fixture(scope="module")
def carried_out(file, tmp_path_factory):
    """The folder of the recipe, of which one run becomes NaN, and the exit code."""
    root = tmp_path_factory.mktemp("recipe") / "root"
    with pytest.MonkeyPatch.context() as patch:
        _poison(patch)
        code = main.main(["--config", file, "--workdir", str(root)])
    return root, code


def _poison(patch):
    """The run of seed 2 finds a NaN in its first iteration."""
    from advmoe_jax.core.errors import NonFiniteError
    from advmoe_jax.train import loop
    iterate = loop.iterate

    def poisoned(system, *args):
        if system.describe == "natural Dense" and loop_seed.get("seed") == 2:
            raise NonFiniteError("step 1: loss is not finite")
        return iterate(system, *args)

    loop_seed, run = {}, loop.run

    def noted(config, *args):
        loop_seed["seed"] = config.seed
        return run(config, *args)

    patch.setattr(loop, "iterate", poisoned)
    patch.setattr(loop, "run", noted)


def test_a_failed_run_stops_only_those_that_need_it(carried_out):
    root, code = carried_out
    states = {name: status.read(root / name).state for name in ("a", "b", "bad", "after", "further", "team")}
    assert code == 2
    assert states == {"a": "finished", "b": "finished", "bad": "failed", "after": "new", "further": "finished",
                      "team": "finished"}
    assert "loss is not finite" in status.read(root / "bad").why
    assert not (root / "after").exists()


def test_a_run_starts_from_the_best_checkpoint_of_another(carried_out, monkeypatch):
    """Its parameters before the first step are those of the source, bit by bit."""
    from advmoe_jax.systems import assemble
    root, _ = carried_out
    experiment = assemble.assemble(configs.read(root / "further" / "config.json"))
    import jax
    state = experiment.system.init(jax.random.key(9))
    source = arrays(root / "a", "best")
    ours = {jax.tree_util.keystr(name): leaf for name, leaf in jax.tree_util.tree_leaves_with_path(
        {"params": state.params, "batch_stats": state.batch_stats})}
    assert len(ours) > 10 and all((source[name] == leaf).all() for name, leaf in ours.items())


def test_a_team_of_two_runs(carried_out):
    """The ensemble is trained from both, evaluated, attacked through its members' logits, and reported."""
    root, _ = carried_out
    found = entries(root / "team")
    assert {entry["attack"] for entry in found} == {"fgsm", "average-2"}
    assert found[0]["method"] == "natural ensemble of 2 Dense"
    assert len(found[0]["facts"]["member_sa"]) == 2
    single = entries(root / "a")[0]["macs"]
    assert {k: v for k, v in found[0]["macs"].items()} == {k: 2 * v for k, v in single.items()}
    report = (root / "team" / "report.md").read_text()
    assert "## Members" in report and "exits" not in report.split("## Members")[0].splitlines()[0]


def test_every_run_knows_where_it_came_from(carried_out, file):
    root, _ = carried_out
    for name in ("a", "team"):
        config = configs.read(root / name / "config.json")
        assert (config.file, config.run, config.name) == (file, name, f"three/{name}")
    assert f"--config {file} --only team --workdir {root}" in (root / "team" / "report.md").read_text()
    assert configs.read(root / "team" / "config.json").init_from == f"{root}/a, {root}/b@last"


def test_the_report_is_made_again(carried_out, capsys):
    root, _ = carried_out
    before = (root / "report.md").read_text()
    (root / "report.md").unlink()
    assert main.main(["--mode", "report", "--workdir", str(root)]) == 0
    assert (root / "report.md").read_text() == before
    assert "# Three and a team" in before and "A note." in before and "91.50" in before and "12.25" in before
    lines = [line for line in before.splitlines() if line.startswith("| alone")]
    assert lines and "2 (0, 1)" in lines[0] and " ± " in lines[0], "a row over seeds, with its deviation"
    assert (root / "rows.png").exists()


def test_finished_runs_are_skipped_and_failed_ones_tried_again(carried_out, file, monkeypatch):
    root, _ = carried_out
    before = listing(root)
    assert main.main(["--config", file, "--workdir", str(root), "--only", "a,b,bad,after"]) == 0
    after = listing(root)
    for name in ("a/checkpoints", "b/checkpoints", "a/results.json", "a/eval"):
        assert {k: v for k, v in after.items() if k.startswith(name)} == {
            k: v for k, v in before.items() if k.startswith(name)}
    assert status.read(root / "bad").state == status.read(root / "after").state == "finished"
    assert status.read(root / "bad").why == ""


def test_list(carried_out, file, capsys):
    root, _ = carried_out
    capsys.readouterr()
    with locks.hold(root / "b"):
        assert main.main(["--config", file, "--workdir", str(root), "--list"]) == 0
    out = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| ")}
    assert "finished" in rows["a"] and f"running, process {os.getpid()}" in rows["b"] and "a, b" in rows["team"]
    assert main.main(["--config", file, "--workdir", str(root), "--list", "--only", "t*"]) == 0
    assert "| a " not in capsys.readouterr().out


def test_a_run_that_another_process_holds_is_left_alone(file, tmp_path, capsys):
    root = tmp_path / "root"
    with locks.hold(root / "a"):
        assert main.main(["--config", file, "--workdir", str(root), "--only", "a,further"]) == 0
    out = capsys.readouterr().out
    assert f"a: left to process {os.getpid()}" in out and "further: waits for a" in out
    assert status.read(root / "a").state == "new" and not (root / "further").exists()


@pytest.mark.parametrize("change, said", [
    ('further=run(4, "a")', None),
    ('further=run(4, "b, c")', "unknown run in init_from of further 'c'"),
    ('further=run(4, "team")', "starts from team, which comes later"),
    ('further=run(4, system__order="router_first")', "system.order"),
    ('further=3', "run further")])
def test_a_recipe_is_checked_whole(change, said, tmp_path, capsys):
    """Before anything is trained, in one line."""
    path = tmp_path / "mine.py"
    path.write_text(FILE.replace("{fields}", repr(SMALL)).replace('further=run(4, "a")', change))
    code = main.main(["--config", str(path), "--workdir", str(tmp_path / "root"), "--list"])
    error = capsys.readouterr().err
    if said is None:
        assert code == 0 and not error
    else:
        assert code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "root").exists()


def test_no_run_matches(file, tmp_path, capsys):
    assert main.main(["--config", file, "--workdir", str(tmp_path / "root"), "--only", "teem"]) == 2
    assert "unknown run in --only 'teem'" in capsys.readouterr().err


def test_sources_must_be_finished_runs_of_the_same_architecture(carried_out, file, tmp_path, capsys):
    root, _ = carried_out
    natural = ["--config", f"{REPO}/configs/digits_r18.py:natural", "--workdir", str(tmp_path / "w"),
               *(f"--config.{name}={value}" for name, value in SMALL.items())]
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text((root / "a" / "config.json").read_text())
    for more, said in ((["--config.init_from=" + str(tmp_path / "begun")], "has not finished training"),
                       (["--config.init_from=" + str(root / "a"), "--config.model.width=8"], "another architecture"),
                       (["--config.init_from=" + f"{root}/a,{root}/b"], "expected one, for a network")):
        assert main.main([*natural, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert not (tmp_path / "w").exists()


def test_who_waits_takes_over_what_another_process_leaves(file, tmp_path, monkeypatch):
    """It has finished nothing when it goes away."""
    root, looks = tmp_path / "root", []
    holding = locks.hold(root / "a")
    holding.__enter__()

    def pause(others, told):
        looks.append(others)
        holding.__exit__(None, None, None)
        return others

    monkeypatch.setattr(recipes, "_wait", pause)
    assert main.main(["--config", file, "--workdir", str(root), "--only", "a,further", "--wait"]) == 0
    assert looks == [f"a (process {os.getpid()} on {socket.gethostname()})"]
    assert [status.read(root / name).state for name in ("a", "further")] == ["finished"] * 2


def test_the_contract_of_a_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_recipe():\n    return 3\n")
    with pytest.raises(UserError, match="expected a core.recipe.Recipe"):
        recipe.load(str(path))
