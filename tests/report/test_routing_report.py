"""A look into the routing of finished runs: against the network asked image by image, and against an evaluation.

Untrained networks of one block of width 4 with two routed layers; 12 images.
"""

import json

import jax
import numpy as np
import pytest
from random_runs import DENSE, random_run

from advmoe_jax.core import config as configs
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import status
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.evaluation import measure, suites
from advmoe_jax.models import model as models
from advmoe_jax.ops import masks as masking
from advmoe_jax.ops import routing as routes
from advmoe_jax.report import overlap, routed, routing, routing_tables
from advmoe_jax.report.pathways import CATEGORIES
from advmoe_jax.report.trained import Trained

pytestmark = pytest.mark.usefixtures("tiny_resnet")
COUNT, ATTACK = 12, "pgd(num_steps=2,eps=0.3,driver=host)"
ROUTED = {"model.expert_init": "independent", "model.router_width": 4}
FILTERS = {"backbone/layer1_0/conv1/kernel": np.array([1, 0, 0, 1], bool).reshape(1, 1, 1, 4),
           "backbone/layer1_0/conv2/kernel": np.array([0, 1, 0, 0], bool).reshape(1, 1, 1, 4)}
FIGURES = ("dissection.png", "routes.png", "layers.png", "classes.png", "iou.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A routed run and a sparse one, what was found, and the model of the first."""
    root = tmp_path_factory.mktemp("routing")
    model, variables = random_run(root / "moe", seed=1, **ROUTED)
    random_run(root / "sparse", masks=FILTERS, **DENSE)
    code = routing.main(["--workdir", str(root / "moe"), "--against", f"{root / 'sparse'}@last", "--out",
                         str(root / "out"), "--images", str(COUNT), "--attack", ATTACK])
    return root, code, json.loads((root / "out" / "routing.json").read_text()), model, variables


def _images():
    test = pipeline.open_dataset("digits", "").test
    return pipeline.images_of(test, np.arange(COUNT))


def _one_by_one(made, route):
    """Labels (m,) and experts (m, L) of the images, each of which is alone in its batch and takes route(i)."""
    *_, model, variables = made
    asked = jax.jit(model.apply)
    outputs = [jax.device_get(asked(variables, image[None], route(i))) for i, image in enumerate(_images()[0])]
    return (np.array([np.argmax(logits[0]) for logits, _ in outputs]),
            np.array([aux["expert_ids"][0] for _, aux in outputs]))


def test_what_the_network_itself_says(made):
    """Loads, pathways, classes, and accuracies of every route, image by image."""
    _, code, found, *_ = made
    assert code == 0 and found["experts"] == 2 and found["layers"] == ["layer1.0.conv1", "layer1.0.conv2"]
    run, y = found["runs"]["moe"], _images()[1]
    labels, experts = _one_by_one(made, lambda i: routes.hard())
    assert run["sa"] == pytest.approx(np.mean(labels == y)) == run["routes"][routed.HELD]["sa"]
    clean = run["pathways"]["clean"]
    np.testing.assert_allclose(clean["load"], [[np.mean(of == e) for e in (0, 1)] for of in experts.T], atol=1e-6)
    assert clean["distinct"] == len({tuple(path) for path in experts}) and clean["possible"] == 4
    for label in range(10):
        if np.any(y == label):
            assert clean["by_class"][label][1][1] == pytest.approx(np.mean(experts[y == label, 1] == 1))
    for name, path in (("expert 0", [0, 0]), ("expert 1", [1, 1]), (routed.COMMON, clean["common"])):
        forced, _ = _one_by_one(made, lambda i, path=path: routes.fixed(np.array([path])))
        assert run["routes"][name]["sa"] == pytest.approx(np.mean(forced == y)), name


def test_every_image_is_in_one_part_and_what_is_left_is_ra(made):
    run = made[2]["runs"]["moe"]
    assert list(run["attacks"]) == [routed.PLAIN, *routes.VIEWS[1:], routed.WORST, routed.ROUTER, routed.EXPERTS]
    for of in run["attacks"].values():
        assert sum(of[category] for category in CATEGORIES) == COUNT
        assert of["ra"] == pytest.approx((of["neither"] + of["router"]) / COUNT)
        assert of["router_robust"] == pytest.approx((of["neither"] + of["pathway"]) / COUNT)
        assert max(of["flip_rate"]) <= 1 - of["router_robust"] + 1e-9 <= sum(of["flip_rate"]) + 2e-9
        assert of["ra"] <= run["sa"] and of["on_attacked_route"] <= run["sa"]
    of_views = [run["attacks"][name]["ra"] for name in (routed.PLAIN, *routes.VIEWS[1:])]
    assert run["attacks"][routed.WORST]["ra"] <= min(of_views) and run["routes"][routed.OWN]["ra"] == (
        run["attacks"][routed.WORST]["ra"])
    assert run["attacks"][routed.EXPERTS]["on_clean_route"] == run["routes"][routed.HELD]["ra"], "the same attack"
    assert run["attacks"][routed.ROUTER]["router_robust"] <= min(
        run["attacks"][name]["router_robust"] for name in (routed.PLAIN, routed.EXPERTS))


@pytest.mark.slow
def test_ra_is_that_of_an_evaluation(made):
    _, _, found, model, variables = made
    suite, = suites.alone(ATTACK, "linf", "0.3")
    test, mesh = pipeline.open_dataset("digits", "").test, meshes.make()
    of = measure.run(model, variables, test, np.arange(COUNT), suite, mesh=mesh, batch_size=COUNT, seed=0)
    record = measure.summarize(of, suite, model)
    attacks = found["runs"]["moe"]["attacks"]
    assert record["ra"] == pytest.approx(attacks[routed.WORST]["ra"])
    assert list(record["ra_by_view"].values()) == pytest.approx([
        attacks[name]["ra"] for name in (routed.PLAIN, *routes.VIEWS[1:])])
    np.testing.assert_allclose(record["facts"]["load"], found["runs"]["moe"]["pathways"]["clean"]["load"], atol=1e-6)


def test_iou_is_of_the_channels_that_both_keep(made):
    """Experts are the lower and the upper half of four channels; the mask keeps 0 and 3, and 1."""
    found, (_, experts) = made[2], _one_by_one(made, lambda i: routes.hard())
    kept = {(0, 0), (0, 3), (1, 1)}
    paths = [{(layer, 2 * e + i) for layer, e in enumerate(path) for i in (0, 1)} for path in experts]
    scores = [len(path & kept) / len(path | kept) for path in paths]
    iou = found["runs"]["moe"]["iou"]
    assert iou["clean"]["mean"] == pytest.approx(np.mean(scores)) and sum(iou["clean"]["counts"]) == COUNT
    assert iou["clean"]["values"] == len(set(scores)) and sum(iou["attacked"]["counts"]) == COUNT
    assert iou["chance"] == pytest.approx(1.5 / (4 + 3 - 1.5))


def test_it_is_drawn_and_told(made):
    root, _, found, *_ = made
    for name in FIGURES:
        assert (root / "out" / name).read_bytes().startswith(b"\x89PNG")
    told = (root / "out" / "table.md").read_text()
    assert [table.title.split(",")[0] for table in routing_tables.of(found)] == [
        "Dissection of attacks", "What routes are worth", "Pathways", "Routed layers of moe",
        f"Pathways against the mask of {root / 'sparse'}"]
    assert f"### Dissection of attacks, {COUNT} test images of digits" in told
    worst = found["runs"]["moe"]["attacks"][routed.WORST]
    row = [f"{100 * worst[name] / COUNT:.2f}" for name in CATEGORIES]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in told.splitlines()]
    assert ["moe", routed.WORST, *row] in [line[:6] for line in cells]


@pytest.mark.slow
def test_several_runs_are_drawn_and_what_is_old_goes(made, tmp_path, capsys):
    found = made[2] | {"runs": {name: made[2]["runs"]["moe"] for name in ("a", "b")}, "against": ""}
    (tmp_path / "iou.png").write_text("of an earlier call")
    routing.write(tmp_path, found)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted({*FIGURES} - {"iou.png"})
    assert "dissection.png" in capsys.readouterr().out


@pytest.mark.slow
def test_one_choice_for_all_layers(tmp_path):
    """Two experts' pathways have two scores, and layers are one."""
    random_run(tmp_path / "moe", seed=2, **ROUTED, **{"model.routing": "global"})
    random_run(tmp_path / "sparse", masks=FILTERS, **DENSE)
    found = routing.measure([str(tmp_path / "moe")], against=str(tmp_path / "sparse"), count=COUNT, attack=ATTACK)
    run = found["runs"]["moe"]
    assert len(run["pathways"]["clean"]["load"]) == 1 and run["pathways"]["clean"]["possible"] == 2
    for images in ("clean", "attacked"):  # 2 and 1 of 3 channels are of one expert, 4 of a pathway
        values, of = run["pathways"][images]["distinct"], run["iou"][images]
        assert of["values"] == values <= 2
        assert all(score in (pytest.approx(2 / 5), pytest.approx(1 / 6)) for score in (of["least"], of["most"]))
    routing.write(tmp_path / "out", found)
    assert (tmp_path / "out" / "classes.png").exists()


@pytest.mark.parametrize("flags, said", [
    (["--images", "-1"], "--images is '-1'"), (["--checkpoint", "ema"], "ema"),
    (["--attack", "fgsm"], "--attack is 'fgsm': expected pgd"), (["--attack", "pgd(loss=kl)"], "a loss of labels"),
    (["--attack", "adaptive"], "expected one attack on a single network"),
    (["--workdir", "nowhere"], "--workdir names nowhere: expected the workdir"),
    (["--against", "nowhere"], "--against names nowhere: expected the workdir"),
    (["--against", "{moe}"], "expected a dense network of which channels are pruned"),
    (["--against", "{sparse}@ema"], "checkpoint in --against"),
    (["--workdir", "{sparse}"], "without routing: expected one network with model.num_experts of 2 or more")])
def test_bad_input_is_one_line(made, capsys, tmp_path, flags, said):
    root, *_ = made
    flags = [flag.format(moe=root / "moe", sparse=root / "sparse") for flag in flags]
    code = routing.main(["--workdir", str(root / "moe"), "--out", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


WEIGHTS = np.random.default_rng(0).integers(0, 2, (3, 3, 4, 4)).astype(bool)


@pytest.mark.parametrize("masks, width, said", [
    (None, 4, "has no masks"), ({"backbone/layer1_0/conv1/kernel": WEIGHTS}, 4, "keeps parts of channels"),
    ({"backbone/conv1/kernel": np.array([1, 0, 0, 1], bool)}, 4, "keeps every channel of the layers"),
    ({"backbone/layer1_0/conv1/kernel": np.ones(8, bool)}, 8, "of another architecture")])
def test_sparse_runs_that_do_not_fit(masks, width, said):
    def run(masks, **fields):
        config = configs.default(data="digits")
        configs.override_all(config, [f"model.{name}={value}" for name, value in {"depth": 4, **fields}.items()])
        model = models.make(configs.complete(config).model, (8, 8, 1), 10)
        trees = masking.of_leaves(model.shapes["params"], masks or {})
        return Trained("", "", config, None, model, {}, trees, 0)

    with pytest.raises(UserError, match=f"it, .*{said}|it: .*{said}") as error:
        overlap.of(run(None, width=4), run(masks, width=width, num_experts=1, model_scale=1.0), "it")
    assert "\n" not in str(error.value)


def test_a_sparse_run_on_other_data(made, tmp_path, capsys):
    random_run(tmp_path / "other", masks=FILTERS, **DENSE, **{"data.name": "cifar10"})
    assert routing.main(["--workdir", str(made[0] / "moe"), "--against", str(tmp_path / "other"), "--out",
                         str(tmp_path / "out")]) == 2
    assert "a run on cifar10: expected digits" in capsys.readouterr().err


def test_runs_that_cannot_be_compared(made, tmp_path, capsys):
    root, *_ = made
    random_run(tmp_path / "five", **ROUTED, **{"model.num_experts": 5, "model.experts": "disjoint"})
    for workdirs, said in (([root / "moe", tmp_path / "five"], "of another architecture"),
                           ([root / "moe", root / "moe"], "another run of that name")):
        assert routing.main(["--workdir", *map(str, workdirs), "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert routing.main(["--workdir", str(tmp_path / "five"), "--against", str(root / "sparse"), "--out",
                         str(tmp_path / "out")]) == 2
    assert "model.experts=disjoint have only where they share out the layer" in capsys.readouterr().err
    status.write(tmp_path / "five", "training")
    assert routing.main(["--workdir", str(tmp_path / "five"), "--out", str(tmp_path / "out")]) == 2
    assert "has not finished training" in capsys.readouterr().err
