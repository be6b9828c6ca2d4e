"""The report of one run: its numbers, its plots, its commands, and damaged files."""

import json
import shlex
import sys

import pytest
from etils import epath
from fabricated import entry, metrics, workdir

from advmoe_jax import main
from advmoe_jax.attacks import adaptive, parse
from advmoe_jax.core import config as configs
from advmoe_jax.core import recipe
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import results, suites
from advmoe_jax.report import commands, comparison, plots, reports, runs, workdir_report


def report(folder):
    reports.write([folder])
    return (folder / "report.md").read_text()


def cells(text, start):
    """The cells of the table rows that start with a cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == start]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_routed_run(tmp_path, capsys):
    text = report(workdir(tmp_path, [entry("last", sa=0.75, ra=0.3), entry("best")], lines=metrics()))
    best, last = cells(text, "best")[0], cells(text, "last")[0]
    assert best == ["best", "30", "200", "80.00 [73.91, 84.95]", "40.00 [33.46, 46.92]", "not measured",
                    "50.00", "45.00", "41.00"]
    assert last[:2] == ["last", "40"] and last[4].startswith("30.00 [")
    assert text.index("| best ") < text.index("| last ")
    assert cells(text, "checkpoint")[0][-4:] == ["RA %, adaptive", "router constant", "ste_selected", "ste_full"]
    assert cells(text, "139.30") == [["139.30", "1.00", "140.30", "280.00"]]
    assert cells(text, "0") == [["0", "25.00 / 75.00", "0.81", "12.50"]] * 2
    assert cells(text, "1")[0] == ["1", "100.00 / 0.00", "0.00", "0.00"]
    for said in ("# AdvMoE\n", "pgd-20, linf eps 8/255, 200 test images of digits", "restarts 1",
                 "float32 (attacks: default) on cpu",
                 "advmoe_jax 0.1.0, jax 0.9", "Config small", "training seed 0",
                 "misclassified when clean count as broken",
                 "worst case per example over the gradients attacked through"):
        assert said in text
    assert "Optimistic" not in text and "label_mod" not in text
    assert is_png(tmp_path / "training.png") and is_png(tmp_path / "layers.png")
    assert "![layers.png](layers.png)" in text
    printed = capsys.readouterr().out
    assert "40.00 [33.46, 46.92]" in printed and "139.30" in printed


def test_dense_run(tmp_path):
    text = report(workdir(tmp_path, [entry(routed=False)], lines=metrics(routed=False)))
    assert cells(text, "checkpoint") == [["checkpoint", "step", "n", "SA %", "RA %"]]
    assert "## Routing" not in text and cells(text, "139.30")[0][1] == "0.00"
    assert is_png(tmp_path / "training.png") and not (tmp_path / "layers.png").exists()


def test_every_attack_and_seed_has_a_table(tmp_path):
    text = report(workdir(
        tmp_path, [entry(), entry(attack="fgsm", ra=0.5), entry(seed=1, ra=0.35), entry("17", step=17)]))
    assert len(cells(text, "best")) == 3 and cells(text, "17")[0][1] == "17"
    assert "### fgsm, linf eps 8/255" in text and "seed 1." in text


def test_warnings(tmp_path):
    text = report(workdir(
        tmp_path, [entry(selected_on="test", method="AdvMoE with label_mod: labels steer the routing")]))
    assert "> Optimistic: the best checkpoint was chosen on test images" in text
    assert "> Trained with label_mod: labels steer the routing." in text


def test_what_was_noticed_is_told(tmp_path):
    noticed = [dict(name="a", reason="a fault", unreliable=True), dict(name="b", reason="no fault", unreliable=False),
               dict(name="not_checked", reason="not checked", unreliable=False)]
    folder = workdir(tmp_path, [entry(flags=noticed), entry("last", flags=noticed[1:])])
    said = [line for line in report(folder).splitlines() if line.startswith("> ")]
    assert said == ["> UNRELIABLE: a fault.", "> Note: not checked.", "> Note: no fault."]
    assert runs.warnings(runs.load(folder).entries) == ("UNRELIABLE: a fault.", "Note: not checked.")


def test_the_adaptive_suite_stands_beside_other_attacks_on_routed_models(tmp_path):
    """Of the same checkpoint and budget; and PGD never alone."""
    found = [entry(), entry("last"), entry(eps="4/255", eps_value=4 / 255),
             entry() | {"attack": "adaptive", "ra": 0.3, "n": 99}]
    run = runs.load(workdir(tmp_path, found))
    shown = {(table.title.split(",")[0], row[0]): row[table.columns.index(runs.ADAPTIVE)] for table in
             workdir_report.accuracy_tables(run) for row in table.rows if runs.ADAPTIVE in table.columns
             and "4/255" not in table.title}
    assert shown == {("pgd-20", "best"): "30.00 (n=99)", ("pgd-20", "last"): "not measured"}
    assert [runs.adaptive([e]) for e in run.entries if e["eps"] == "4/255"] == ["not measured"]
    columns = [table.columns for table in comparison.compare([run])]
    assert [runs.ADAPTIVE in names for names in columns] == [True, False, True]


def test_not_evaluated(tmp_path, capsys):
    text = report(workdir(tmp_path, [], lines=metrics()))
    assert "Not evaluated yet" in text and "not evaluated yet" in capsys.readouterr().out
    assert (tmp_path / "layers.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    text = report(workdir(tmp_path, [entry()], lines=metrics()))
    assert "## Training" not in text and not list(tmp_path.glob("*.png"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "advmoe_jax[quickstart]" in said


@pytest.mark.parametrize("content", [
    "{", "[]", '{"entries": 3}', '{"entries": [3]}', '{"entries": [{"step": 1}]}', "\xff"])
def test_damaged_results(tmp_path, content):
    folder = workdir(tmp_path, [])
    (folder / "results.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"results\.json is damaged: .*--mode evaluate again") as caught:
        reports.write([folder])
    assert "\n" not in str(caught.value)


def test_a_result_of_which_a_field_is_damaged_is_named(tmp_path):
    results.add(tmp_path, [entry(), entry("last")])
    stored = json.loads((tmp_path / "results.json").read_text())
    assert len(results.read(tmp_path)) == 2
    for name in results.FIELDS:
        damaged = {"schema": stored["schema"], "entries": [stored["entries"][0], stored["entries"][1] | {name: None}]}
        (tmp_path / "results.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=f"results.json is damaged: entry 1 has no '{name}'"):
            results.read(tmp_path)


@pytest.mark.parametrize("content", ['{"st\n{"step": 1, "split": "train", "epoch": 1}\n{}\n', "[1]\n", '{"step": 1}\n'])
def test_damaged_metrics(tmp_path, content):
    folder = workdir(tmp_path, [])
    (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        reports.write([folder])


def test_metrics_that_end_in_the_middle_of_a_line(tmp_path):
    folder = workdir(tmp_path, [entry()], lines=metrics())
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "spl')
    assert len(runs.load(folder).metrics) == 8
    report(folder)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="it has no config.json"):
        reports.write([tmp_path])


def test_a_single_routed_choice_and_many_experts(tmp_path):
    facts = {"load": [[0.2] * 5], "load_entropy": [1.0], "flip_rate": [0.0]}
    lines = [r | {k: v[:1] for k, v in r.items() if isinstance(v, list)} for r in metrics()]
    folder = workdir(tmp_path, [entry(facts=facts)], lines=lines)
    assert plots.write(runs.load(folder)) == ("training.png", "layers.png")


def test_train_command_gives_the_same_config(tmp_path, monkeypatch):
    (tmp_path / "configs" / "paper").mkdir(parents=True)
    (tmp_path / "configs" / "paper" / "tiny_net.py").write_text(
        "from advmoe_jax.core import config as configs\n"
        "from advmoe_jax.systems import methods\n"
        "def get_config(method='advmoe'):\n"
        "    config = configs.default()\n"
        "    methods.choose(config, method)\n"
        "    return config\n")
    monkeypatch.chdir(tmp_path)
    config = configs.load("configs/paper/tiny_net.py:at_dense")
    config.seed, config.train.length, config.data.flip = 3, "4 epochs", False
    configs.write(config, tmp_path / "a run" / "config.json")
    flags, overrides = main.parse(shlex.split(commands.train(runs.load(tmp_path / "a run")))[3:])
    assert flags.config == "configs/paper/tiny_net.py:at_dense" and flags.workdir == str(tmp_path / "a run")
    assert overrides == ["data.flip=False", "seed=3", "train.length=4 epochs"]
    again = configs.load(flags.config)
    configs.override_all(again, overrides)
    assert again.to_dict() == config.to_dict()


def test_train_command_of_a_run_of_a_recipe(tmp_path, monkeypatch):
    """It takes the run out of the recipe, in the recipe's folder."""
    (tmp_path / "pair.py").write_text(
        "from advmoe_jax.core import config as configs\n"
        "from advmoe_jax.core.recipe import Recipe\n"
        "def get_recipe():\n"
        "    runs = {name: configs.default(data='digits') for name in ('first', 'second')}\n"
        "    runs['second'].init_from = 'first'\n"
        "    return Recipe(runs)\n")
    monkeypatch.chdir(tmp_path)
    planned = recipe.plan(recipe.load("pair.py"), epath.Path("runs") / "pair")
    config = planned[1].config
    config.seed = 3
    configs.write(config, planned[1].workdir / "config.json")
    flags, overrides = main.parse(shlex.split(commands.train(runs.load(planned[1].workdir)))[3:])
    assert (flags.config, flags.only, flags.workdir) == ("pair.py", "second", "runs/pair")
    assert overrides == ["seed=3"]
    again = recipe.load(flags.config)
    configs.override_all(again.runs["second"], overrides)
    assert recipe.plan(again, epath.Path(flags.workdir))[1].config.to_dict() == config.to_dict()


def test_train_command_of_a_config_file_that_is_gone(tmp_path):
    assert commands.train(runs.load(workdir(tmp_path / "r", [], **{"seed": 4}))) == (
        f"python -m advmoe_jax.main --config configs/small.py --workdir {tmp_path / 'r'}")


def test_evaluate_command_gives_the_same_attacks(tmp_path):
    found = [entry(), entry("last"), entry(attack="fgsm"),
             entry("17", seed=2, attack="pgd(restarts=2,norm=l2)", eps="0.5")]
    run = runs.load(workdir(tmp_path, found))
    parsed = [main.parse(shlex.split(command)[3:]) for command in commands.evaluate(run)]
    assert [flags.checkpoint for flags, _ in parsed] == ["", "17"]
    settings = []
    for _, overrides in parsed:
        fields = dict(text.split("=", 1) for text in overrides)
        assert fields["eval.n"] == "200" and "eval.suite" not in fields
        settings += [{k: str(v) for k, v in sorted(vars(spec.config).items())}
                     for spec in parse.attacks(fields["eval.attacks"])]
    assert settings == [found[0]["settings"], found[2]["settings"], found[3]["settings"]]
    assert workdir_report.macs_table(run).columns == ("pathway", "router", "total", "executed")


@pytest.mark.parametrize(
    "text", ("standard", "normalized(eps_sd=0.01) pgd cw_l2(norm=l2,eps=0.5)", *adaptive.MODES))
def test_evaluate_command_gives_the_same_suite(text, tmp_path):
    text = f"adaptive(mode={text})" if text in adaptive.MODES else text
    wanted = [suites.together(text, "linf", eps) for eps in ("2/255", "8/255")]
    found = [entry(attack="fgsm") | {"attack": suite.name, "norm": suite.norm, "eps": suite.eps,
                                     "settings": suite.settings, "asked": suite.asked} for suite in wanted]
    command, = commands.evaluate(runs.load(workdir(tmp_path, found)))
    cfg = configs.default()
    for override in main.parse(shlex.split(command)[3:])[1]:
        configs.override(cfg, override)
    again = [suites.together(cfg.eval.suite, cfg.eval.norm, eps.strip()) for eps in cfg.eval.eps.split(",")]
    assert [s.settings for s in again] == [s.settings for s in wanted] and again[0].name == wanted[0].name


def test_evaluate_command_of_an_attack_whose_table_has_another_name(tmp_path):
    suite, = suites.alone("normalized(eps_sd=0.01)", "linf", "8/255")
    found = entry() | {"attack": suite.name, "settings": suite.settings, "asked": suite.asked}
    command, = commands.evaluate(runs.load(workdir(tmp_path, [found], **{"eval.suite": "standard"})))
    fields = dict(text.split("=", 1) for text in main.parse(shlex.split(command)[3:])[1])
    again, = suites.alone(fields["eval.attacks"], "linf", "8/255")
    assert fields["eval.suite"] == "" and again.settings == suite.settings


def test_a_team_and_the_pool_that_it_was_chosen_from(tmp_path):
    found = {"rule": {"choose": "budget_fill", "rd_threshold": 0.7, "rd_images": 512, "rd_on": "training",
                      "rd_attack": "base_transfer"},
             "pool": [{"name": f"runs/{name}", "run": name, "step": 3, "fails": 0.25, "own_ra": 0.5} for name in "abc"],
             "team": [2, 0], "diversity": 0.625, "falls_back": True,
             "teams": [["0 2", 0.625], ["0 1 2", 0.5], ["0 1", 0.25]]}
    folder = workdir(tmp_path / "team", [entry(routed=False) | {"ra_by_view": {"none": 0.4, "soft": 0.5}}])
    (folder / "team.json").write_text(json.dumps(found))
    workdir_report.write(runs.load(folder))
    text = (folder / "report.md").read_text()
    assert "robust diversity 0.625, below the threshold" in text and "they are no robustness" in text
    assert [line.split("|")[1:3] for line in text.splitlines() if line.startswith(("| a ", "| b ", "| c "))] == [
        [" a   ", " 1      "], [" b   ", "        "], [" c   ", " 0      "]]
    assert "router" not in text.split("## MACs")[0], "the gradients are not those of a router"
    assert is_png(folder / "team.png")
    (folder / "team.json").write_text("{}")
    with pytest.raises(UserError, match="team.json is damaged"):
        workdir_report.write(runs.load(folder))
