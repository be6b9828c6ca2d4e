"""The recipes of papers' tables: every cell has its run or is the paper's alone, and numbers are as printed.

That all their configs pass their checks, tests/test_end_to_end.py shows of every file.
"""

import re

import numpy as np
import pytest
from tiny import REPO

from advmoe_jax.core import config as configs
from advmoe_jax.core import recipe
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import plan
from advmoe_jax.report import criteria

A, B, C = "fgsm-0.01sd", "fgsm-0.1sd", "pgd-3-8/255sd"
SRGKP = f"{REPO}/configs/paper/srgkp_tables.py"


@pytest.fixture(scope="module")
def srgkp():
    return recipe.load(SRGKP)


def _number(table):
    return int(re.match(r"Table (\d+)", table.title)[1])


def _lines(loaded, number):
    """{(label, best by): line} of a table."""
    return {(line.label, line.best): line for table in loaded.tables if _number(table) == number
            for line in table.lines}


def test_all_tables_are_there(srgkp):
    assert [_number(table) for table in srgkp.tables] == list(range(1, 21))
    assert all(table.lines for table in srgkp.tables)


def test_numbers_are_the_papers(srgkp):
    """A handful, of different parts of the text."""
    for number, label, best, printed in (
            (1, "L1Norm-B", "benign", {"benign": 92.62, "hfc-0.3": 79.83, "hfc-0.5": 56.06, "hfc-0.7": 27.15}),
            (2, "FPGM", A, {"benign": 93.37, A: 76.28, B: 44.96, C: 44.66, "MACs, M": 71.661, "params, M": 0.482}),
            (3, "SR-GKP, self-trained", "benign", {"benign": 75.29, "fgsm-0.001sd": 68.02, A: 26.45, B: 15.83, C: 8.08,
                                                   "MACs, M": 2725.954, "params, M": 17.069}),
            (6, "ResNet-56, SFP, CSB 0.75", "last", {"benign": 92.26, A: 72.11, B: 37.42, C: 36.64}),
            (10, "DHP", B, {"benign": 92.07, A: 70.42, B: 31.54, C: 32.83, "MACs, M": 73.289, "params, M": 0.480}),
            (12, "SR-GKP", B, {"benign": 93.86, A: 83.61, B: 59.03, C: 66.62, "MACs, M": 178.184, "params, M": 8.293}),
            (16, "CSB 0.5", "benign", {"benign": 95.0, A: 78.01, B: 46.53, "MACs, M": 144.551, "params, M": 0.976}),
            (19, "SR-GKP", A, {"benign": 94.17, A: 76.52, B: 43.98, C: 46.01, "MACs, M": 97.217, "params, M": 0.654})):
        assert _lines(srgkp, number)[label, best].printed == printed
    assert _lines(srgkp, 9)["RAP-ADMM", "last"].printed[C] == 57.66
    assert _lines(srgkp, 7)["SR-GKP", ""].printed["ResNet-110 total"] == "1h 10m 16s"
    assert _lines(srgkp, 2)["SR-GKP", B].printed == {"MACs, M": 71.855, "params, M": 0.482}, "what cannot be read"


def test_what_is_not_built_is_the_papers_alone(srgkp):
    unbuilt = re.compile(r"(^|, )(DHP|GAL|NPPM|CC|LRF|OTOv2.*|TMI-GKP|TMI-driven.*)($|,)")
    for table in srgkp.tables:
        for line in table.lines if _number(table) not in (7, 20) else ():
            alone = bool(unbuilt.search(line.label))
            assert bool(line.runs) != alone or line.label == "RAP-ADMM" and line.ours, line
            assert line.runs or line.printed
    assert {label for label, best in _lines(srgkp, 20) if unbuilt.search(label)} == {"CC", "DHP", "NPPM"}
    assert not any(_lines(srgkp, 20)[label, "ResNet-32"].runs for label in ("CC", "DHP", "NPPM"))
    assert {run for table in srgkp.tables for line in table.lines for run in line.runs} <= srgkp.runs.keys()
    labels = {label for label, _ in _lines(srgkp, 10)}
    assert {"CC (channels)", "LRF (score)", "TMI-GKP (greedy)", "random filters", "HRank", "RAP-ADMM"} <= labels


def test_a_superscore_of_the_printed_rows_gives_the_printed_ranks(srgkp):
    """Table 20 by tables 17 to 19; where two tie, in one criterion of ResNet-110, the paper ranks one before the other.
    """
    ranks = _lines(srgkp, 20)
    methods = [label for label, best in ranks if best == "all" and ranks[label, best].printed]
    assert len(methods) == 8
    for number, column in ((17, "ResNet-32"), (18, "ResNet-56"), (19, "ResNet-110")):
        lines = _lines(srgkp, number)
        best = [[max(line.printed.get(name, 0) for (label, _), line in lines.items() if label == method)
                 for name in ("benign", A, B, C)] for method in methods]
        if number == 19:
            best[methods.index("FPGM")][-1] = 47.75  # of which a digit cannot be read
        printed = [ranks[method, column].printed[column] for method in methods]
        np.testing.assert_allclose(criteria.mean_ranks(best), printed, atol=0.126 if number == 19 else 1e-9)


def test_runs_are_what_their_rows_say(srgkp):
    runs = srgkp.runs
    base, pruned = runs["r56"], runs["r56-srgkp-7"]
    assert base.system.loss == "natural" and base.model.depth == 56 and base.train.length == "300 epochs"
    assert (base.optim.backbone.learning_rate, pruned.optim.backbone.learning_rate) == (0.1, 0.01)
    assert base.optim.backbone.schedule == pruned.optim.backbone.schedule == "multistep(100 epochs:0.1,200 epochs:0.1)"
    assert (pruned.system.method, pruned.system.rate, pruned.system.alpha) == ("srgkp", "7/16", 0.9)
    assert pruned.init_from == "r56" and pruned.train.select_on == "test" and pruned.model.shortcut_pad == "end"
    assert runs["r110-srgkp0.5-7"].system.alpha == 0.5 and _lines(srgkp, 11)["SR-GKP", A].runs == ("r110-srgkp0.5-7",)
    assert runs["r32-sfp0.75-7"].system.norm_weight == 0.75 and runs["r56-l1norm_b-10"].system.variant == "B"
    rap, drawn = runs["r32-rap-7"], runs["r32-admm-7"]
    assert rap.init_from == "r32-admm-7@last" and rap.system.unit == drawn.system.unit == "filter"
    assert rap.system.loss == drawn.system.loss == "madry" and rap.attack.eps == drawn.attack.eps == "8/255"
    assert runs["r50tv"].train.length == "0 steps" and runs["r50tv-srgkp-6"].system.kernels == "all"
    assert runs["tiny101-srgkp-14"].system.rate == "14/16" and "frequency" in base.train.criteria
    assert runs["r56-fpgm-7-once"].train.length == "0 steps"


def test_traits_are_of_each_methods_file(srgkp):
    lines = _lines(srgkp, 8)
    assert lines["SFP", ""].ours == {
        "venue": "IJCAI 2018", "type": "F", "procedure": "Iterative", "special setup": "soft pruning",
        "zero-masked": "Y", "fully pruned epoch": "after each epoch"}
    for label in ("FPGM", "SFP", "L1Norm", "SR-GKP"):  # what both say
        ours, theirs = lines[label, ""].ours, lines[label, ""].printed
        assert [ours[name] for name in ("type", "procedure", "zero-masked")] == [
            theirs[name] for name in ("type", "procedure", "zero-masked")], label
    assert lines["CC (channels)", ""].ours["special setup"] == "requires data (gradients)"


def test_one_table_has_its_runs_and_those_that_they_need():
    loaded = recipe.load(f"{SRGKP}:4")
    assert [_number(table) for table in loaded.tables] == [4]
    assert list(loaded.runs) == ["r32", "r32-tmi-7", "r32-tmi_random-7", "r32-greedy-7", "r56", "r56-tmi-7",
                                 "r56-tmi_random-7", "r56-greedy-7"]
    assert list(recipe.load(f"{SRGKP}:7").runs) == ["r32", "r32-srgkp-7-once", "r56", "r56-srgkp-7-once", "r110",
                                                    "r110-srgkp-7-once"]
    with pytest.raises(UserError, match="unknown table in the recipe's argument '21'"):
        recipe.load(f"{SRGKP}:21")


PRALAB = f"{REPO}/configs/paper/pralab_tables.py"


@pytest.fixture(scope="module")
def pralab():
    return recipe.load(PRALAB)


def test_every_share_of_the_benchmark_has_its_runs(pralab):
    irregular, filters = pralab.tables
    trivial, single = ("magnitude", "random"), ("HYDRA", "MAD", "RST", "TwinRep", "Flying Bird")
    for table, methods, shares in ((irregular, ("R-ADMM", "HARP", *single, *trivial), (90, 95, 99)),
                                   (filters, ("R-ADMM", "HARP", *trivial), (50, 75, 90))):
        ours = {line.label for line in table.lines if line.runs}
        assert ours == {"AT(Dense)", *(f"{method}, {share} %" for method in methods for share in shares)}
        assert table.columns == ("SA", "RA by standard", "MACs, M", "params, M")
    printed = {line.label: line.printed for line in irregular.lines if line.printed}
    assert len(printed) == 7 * 3 and not any(line.printed for line in filters.lines)
    assert printed["HYDRA, 90 %"] == {"SA": 76.74, "RA by standard": 43.34}
    assert printed["R-ADMM, 99 %"] == {"SA": 71.17, "RA by standard": 37.21}
    assert printed["Flying Bird, 95 %"] == {"SA": 77.42, "RA by standard": 46.10}
    svhn = {line.label: line.printed for line in recipe.load(f"{PRALAB}:svhn").tables[0].lines if line.printed}
    assert len(svhn) == 5 * 3 and svhn["HARP, 99 %"] == {"SA": 93.38, "RA by standard": 34.42}


def test_phases_of_the_benchmark_follow_each_other(pralab):
    runs = pralab.runs
    assert runs["base"].train.length == "100 epochs" and runs["base"].eval.suite == "standard"
    assert (runs["admm-s75"].init_from, runs["radmm-s75"].init_from) == ("base", "admm-s75@last")
    assert runs["radmm-s75"].system.unit == runs["rates-s75"].system.unit == "filter"
    assert runs["rates-us99"].system.learn_rates and not runs["search-us99"].system.learn_rates
    for name in ("hydra-us99", "harp-us99"):
        assert runs[name].system.method == "given" and runs[name].init_from.endswith("us99@last")
        assert runs[runs[name].init_from.removesuffix("@last")].system.rate == "99/100"
    assert runs["random-us95"].system.method == "random_weights" and runs["random-us95"].train.length == "120 epochs"
    scratch = runs["rst-us90"], runs["twin_rep-us90"], runs["flying_bird-us90"]
    assert {(config.init_from, config.train.length, config.system.rate) for config in scratch} == {
        ("", "220 epochs", "9/10")}
    with pytest.raises(UserError, match="unknown network in the recipe's argument 'resnet34'"):
        recipe.load(f"{PRALAB}:resnet34")


EED = f"{REPO}/configs/paper/eed_tables.py"


def test_hosts_and_weights_of_eed_differ_in_what_their_rows_say():
    hosts = recipe.load(f"{EED}:9")
    assert {row: hosts.runs[name].system.host for row, (name,) in hosts.rows.items()} == {
        "ADP": "adp", "GAL": "gal", "DVERGE": "dverge", "SoE": "soe"}
    assert hosts.paper["SoE"] == {"SA": 85.85, "RA": 47.90}
    configs.check(hosts.runs[hosts.rows["SoE"][0]])
    swept = recipe.load(f"{EED}:fig6")
    fields = {"lambda1": "lambda_weights", "lambda2": "lambda_activity", "omega": "omega", "gamma": "gamma"}
    assert len(swept.rows) == 1 + 3 + 3 + 2 + 2 and swept.paper["as in table 1"] == {"SA": 86.13, "RA": 48.13}
    base = swept.runs[swept.rows["as in table 1"][0]].system
    for row, (name,) in swept.rows.items():
        changed = {field for field in base if swept.runs[name].system[field] != base[field]}
        of, _, value = row.partition(" ")
        assert changed == ({fields[of]} if of in fields else set())
        assert of not in fields or swept.runs[name].system[fields[of]] == float(value)
    assert {"lambda1 0.6", "lambda2 0.3"} <= swept.rows.keys() and "peaks" in swept.notes[0]
    assert (base.omega, base.gamma) == (10, 4), "where the others peak"


def test_eed_s_networks_that_learn_from_other_images():
    runs = recipe.load(f"{EED}:fig2").runs
    assert {name: run.system.loss for name, run in runs.items()} == {
        "clean": "natural", "attacked": "madry", "both": "trades"}
    assert len({(run.seed, run.model.name, run.model.depth, run.model.width) for run in runs.values()}) == 1
    for run in runs.values():
        configs.check(run)


def test_rap_admm_beside_filters_that_go_at_once():
    loaded = recipe.load(f"{REPO}/configs/paper/rap_admm.py:32")
    [table] = loaded.tables
    lines = {line.label: line for line in table.lines}
    assert lines["RAP-ADMM"].printed == {"benign": 74.88, A: 72.27, B: 25.80, C: 57.66, "MACs, M": 39.37,
                                         "params, M": 0.271}
    assert set(lines) == {"Unpruned", "RAP-ADMM", "small filters", "random filters"}
    for name in ("r32-rap-7", "magnitude", "random"):
        run = loaded.runs[name]
        assert (run.system.loss, run.system.unit, run.system.rate, run.attack.eps) == (
            "madry", "filter", "7/16", "8/255")
    assert loaded.runs["magnitude"].train.length == "300 epochs" == loaded.runs["r32"].train.length
    assert loaded.runs["r32-rap-7"].train.length == "150 epochs"


@pytest.mark.parametrize("table, mad, twins", [
    ("1", (74.18, 41.27), (77.26, 43.52)), ("1-svhn", (92.84, 39.87), (92.96, 44.73)),
    ("1-vgg16", (73.65, 40.88), (76.04, 43.26)), ("1-vgg16-svhn", (89.94, 40.31), (92.60, 49.06))])
def test_every_row_of_eeds_first_table_is_trained(table, mad, twins):
    loaded = recipe.load(f"{REPO}/configs/paper/eed_tables.py:{table}")
    assert list(loaded.rows) == list(loaded.paper) == [
        "AT", "R-ADMM", "HYDRA", "RST", "MAD", "Flying Bird", "HARP", "TwinRep", "EED"]
    assert loaded.paper["MAD"] == dict(zip(("SA", "RA"), mad))
    assert loaded.paper["TwinRep"] == dict(zip(("SA", "RA"), twins))
    runs = {row: loaded.runs[name] for row, [name] in loaded.rows.items()}
    assert (runs["MAD"].system.method, runs["MAD"].init_from, runs["MAD"].train.length) == ("mad", "base", "60 epochs")
    assert (runs["TwinRep"].system.name, runs["TwinRep"].init_from) == ("twin_rep", "")
    assert all(run.system.loss == "madry" and run.eval.suite == "standard" for run in runs.values())
    assert {runs[row].system.rate for row in ("R-ADMM", "RST", "MAD", "Flying Bird", "TwinRep")} == {"4/5"}


ADVMOE = f"{REPO}/configs/paper/advmoe_tables.py"


def _entries(loaded):
    """{(table, label): (printed, configs)} of a recipe."""
    return {(table.title, line.label): (line.printed, [loaded.runs[name] for name in line.runs])
            for table in loaded.tables for line in table.lines}


@pytest.fixture(scope="module")
def advmoe():
    return recipe.load(f"{ADVMOE}:table1")


def test_every_cell_of_advmoes_first_table(advmoe):
    found = _entries(advmoe)
    assert [(table.title, len(table.lines)) for table in advmoe.tables] == [
        (f"Table 1: {data}", 5 * count) for data, count in (
            ("CIFAR-10", 4), ("CIFAR-100", 4), ("Tiny-ImageNet", 2), ("ImageNet", 2))]
    assert not advmoe.paper and all([run.seed for run in runs] == [0, 1, 2] for _, runs in found.values())
    for table, label, ra, sa, macs in (
            ("CIFAR-10", "ResNet-18, AT(MoE)", "45.57 ± 0.51", "78.84 ± 0.75", "150"),
            ("CIFAR-10", "DenseNet, AdvMoE", "39.97 ± 0.11", "70.13 ± 0.15", "30"),
            ("CIFAR-100", "VGG-16, AT(Sparse)", "21.12 ± 0.22", "48.03 ± 0.17", "70"),
            ("Tiny-ImageNet", "WRN-28-10, AT(Dense)", "38.82 ± 0.15", "55.30 ± 0.19", "21000"),
            ("ImageNet", "ResNet-18, AdvMoE", "43.32 ± 0.12", "59.72 ± 0.17", "670")):
        printed, runs = found[f"Table 1: {table}", label]
        assert printed == {"RA by pgd-50": ra, "SA": sa, "total MACs, M": macs}
        assert all(run.system.loss == "trades" and run.train.length == "100 epochs" for run in runs)
    tiny, large = (found[f"Table 1: {data}", "WRN-28-10, AdvMoE"][1][0] for data in ("Tiny-ImageNet", "ImageNet"))
    assert (tiny.attack.eps, tiny.model.stem, tiny.data.batch_size) == ("2/255", "cifar", 128)
    assert (large.attack.eps, large.model.stem, large.data.batch_size) == ("2/255", "imagenet", 512)


def test_a_sparse_network_is_searched_and_then_trained(advmoe):
    runs = advmoe.runs
    for name in ("cifar10-r18", "imagenet-wrn"):
        search, left = runs[f"{name}-at_sparse-s1-search"], runs[f"{name}-at_sparse-s1"]
        assert (search.init_from, left.init_from) == (f"{name}-at_dense-s1", f"{name}-at_sparse-s1-search@last")
        assert (search.system.unit, search.system.coupled, search.system.rate) == ("filter", True, "1/2")
        assert left.system.method == "given" and {search.train.length, left.train.length} == {"100 epochs"}
        assert search.system.loss == left.system.loss == "trades" and left.model.model_scale == 1
        configs.check(search), configs.check(left)
    assert runs["cifar100-vgg-at_sparse-s0"].model.form == "released"


def test_ablations_of_advmoe_differ_in_what_they_are_about(advmoe):
    second = _entries(recipe.load(f"{ADVMOE}:table2"))
    printed, [run, *_] = second["Table 2: CIFAR-100", "ResNet-18, AT(MoE)"]
    assert printed == {"RA by pgd-50": "22.72 ± 0.42", "RA by standard": "16.33 ± 0.25", "SA": "53.34 ± 0.61",
                       "total MACs, M": "150"}
    assert [suite.name for suite in plan.asked(run)] == ["pgd-50", "standard"]
    assert not configs.differences(run, advmoe.runs["cifar100-r18-at_moe-s0"]), "the same runs"
    [steps, *_] = _entries(recipe.load(f"{ADVMOE}:a1"))[
        "Table A1: CIFAR-10, trained with PGD-10", "WRN-28-10, AT(Dense)"][1]
    assert "num_steps=10" in steps.train.attack and "-k10-" in steps.name
    scaled = recipe.load(f"{ADVMOE}:a2")
    printed, [narrow, *_] = _entries(scaled)["Table A2: CIFAR-10, WRN-28-10", "AT(MoE), r = 0.2"]
    assert printed["RA by pgd-50"] == "42.29 ± 0.51" and narrow.model.model_scale == 0.2
    assert scaled.runs["cifar10-wrn-at_sparse-r0.2-s0-search"].system.rate == "4/5"
    assert scaled.runs["cifar10-wrn-at_sparse-r0.2-s0-search"].init_from == "cifar10-wrn-at_dense-s0"
    assert len(_entries(scaled)) == 2 * (3 * 4 + 1)


@pytest.mark.slow
def test_the_figures_of_advmoe():
    first = _entries(recipe.load(f"{ADVMOE}:fig1"))
    printed, [natural, *_] = first["Figure 1: CIFAR-10, VGG-16", "standard S-Dense"]
    assert printed == {"SA": "92.2"} and (natural.system.loss, natural.model.model_scale) == ("natural", 0.5)
    assert first["Figure 1: CIFAR-10, DenseNet", "AT(MoE)"][0] == {"RA by pgd-50": "31.4"}
    assert len(plan.asked(next(iter(recipe.load(f"{ADVMOE}:fig2").runs.values())))) == 4
    runs = recipe.load(f"{ADVMOE}:fig3").runs
    mask, router = runs["cifar10-r18-mask-r0.8-s2"], runs["cifar10-r18-router-r0.8-s2"]
    assert (mask.system.name, mask.system.rate, mask.init_from) == ("mask_search", "1/5", "cifar10-r18-dense-s2")
    assert (router.system.trains, router.init_from) == ("router", "cifar10-r18-moe-r0.8-s2")
    assert runs["cifar10-r18-moe-r0.8-s2"].system.loss == runs["cifar10-r18-dense-s2"].system.loss == "natural"
    backbone = recipe.load(f"{ADVMOE}:fig5").runs["cifar10-r18-backbone-s0"]
    assert (backbone.system.trains, backbone.init_from) == ("backbone", "cifar10-r18-router-s0")
    sweep = recipe.load(f"{ADVMOE}:fig7")
    assert len(sweep.rows) == 4 * 9 + 1 and sweep.runs["cifar10-r18-advmoe-r0.3-n8-s1"].model.num_experts == 8
    assert {run.data.name for run in recipe.load(f"{ADVMOE}:fig6").runs.values()} == {"cifar100"}
    assert all(run.train.select_on == "test" for run in recipe.load(f"{ADVMOE}:figA2").runs.values())


def test_the_small_form_of_advmoes_table():
    small = recipe.load(f"{ADVMOE}:digits")
    assert {run.data.name for run in small.runs.values()} == {"digits"} and len(small.runs) == 9
    assert all((run.seed, run.model.width, run.train.length) == (0, 16, "60 epochs") for run in small.runs.values())
    assert len(recipe.load(f"{ADVMOE}:r18_cifar10").runs) == 3 * 9
    vit = recipe.load(f"{ADVMOE}:table3")
    assert len(_entries(vit)) == 2
    assert {(run.model.name, run.optim.backbone.optimizer) for run in vit.runs.values()} == {("vit", "adamw")}
    with pytest.raises(UserError, match="unknown table in the recipe's argument 'table4'"):
        recipe.load(f"{ADVMOE}:table4")
