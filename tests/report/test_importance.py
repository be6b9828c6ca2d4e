"""What networks hold important: scores of finished runs, node by node, and how alike they rank weights."""

import json

import numpy as np
import pytest
from random_runs import DENSE, random_run
from scipy.stats import spearmanr

from advmoe_jax.core import status, tree
from advmoe_jax.core.layer_spec import dotted
from advmoe_jax.report import importance

pytestmark = pytest.mark.usefixtures("tiny_resnet")
NAMES = ("clean", "attacked", "both")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs, of which the last has the weights of the first, what was found in them, and the runs by name."""
    root = tmp_path_factory.mktemp("importance")
    runs = {name: random_run(root / name, seed, **DENSE) for seed, name in zip((0, 1, 0), NAMES)}
    code = importance.main(["--workdir", *(str(root / name) for name in NAMES), "--out", str(root / "out"), "--images",
                            "4", "--attack", "fgsm"])
    return root, code, json.loads((root / "out" / "importance.json").read_text()), runs


def test_nodes_and_ranks_are_those_of_the_scores(made):
    root, code, found, runs = made
    assert code == 0 and list(found["runs"]) == list(NAMES) and found["runs"]["both"]["step"] == 0
    assert found["scores"] == ["nis", "erm", "ase", "bnsf"] and found["images"] == 4
    kernels = [{dotted(spec.path): np.abs(tree.named_leaves(variables["params"])[f"{spec.path}/kernel"])
                for spec in model.layers} for model, variables in list(runs.values())[:2]]
    assert found["layers"] == {layer: of.size for layer, of in kernels[0].items()}
    for layer, of in kernels[0].items():
        means = of.reshape(-1, of.shape[-1]).mean(0)
        np.testing.assert_allclose(found["nodes"]["clean"]["erm"][layer], means / means.max(), atol=1e-3)
        expected = spearmanr(of.ravel(), kernels[1][layer].ravel()).statistic
        assert found["runs_alike"]["erm"]["clean, attacked"][layer] == pytest.approx(expected, abs=1e-3)
        assert found["runs_alike"]["ase"]["clean, both"][layer] == pytest.approx(1, abs=1e-3), "the same weights"
        assert found["scores_alike"]["clean"]["erm, bnsf"][layer] == pytest.approx(1, abs=1e-3), "norms are fresh"
        assert found["scores_alike"]["clean"]["nis, ase"][layer] < 0.99


def test_it_is_drawn_and_told(made, capsys):
    root, _, found, _ = made
    for name in ("importance.png", "ranks.png"):
        assert (root / "out" / name).read_bytes().startswith(b"\x89PNG")
    runs, scores = importance.summary(found)
    assert runs.columns == ("score", "clean, attacked", "clean, both", "attacked, both") and len(runs.rows) == 4
    assert [row[0] for row in scores.rows] == list(NAMES) and len(scores.columns) == 1 + 6
    assert all(row[2] == "1.00" for row in runs.rows)
    importance.write(root / "again", found)
    assert "Scores that rank weights alike" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (["--scores", "nis,ers"], "unknown --scores 'ers': expected"), (["--scores", ","], "--scores is ','"),
    (["--images", "0"], "--images is '0'"), (["--attack", "exits"], "--attack is 'exits': expected one attack"),
    (["--checkpoint", "ema"], "ema"), (["--workdir", "nowhere"], "--workdir names nowhere: expected the workdir")])
def test_bad_input_is_one_line(made, capsys, tmp_path, flags, said):
    root, *_ = made
    code = importance.main(["--workdir", str(root / "clean"), "--out", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_runs_that_cannot_be_compared(made, capsys, tmp_path):
    root, *_ = made
    random_run(tmp_path / "wide", **DENSE, **{"model.width": 8})
    random_run(tmp_path / "clean", **DENSE)
    for other, said in (("wide", "of another architecture"), ("clean", "another run of that name")):
        assert importance.main(["--workdir", str(root / "clean"), str(tmp_path / other), "--out", str(tmp_path)]) == 2
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1
    status.write(tmp_path / "wide", "training")
    assert importance.main(["--workdir", str(tmp_path / "wide"), "--out", str(tmp_path)]) == 2
    assert "has not finished training" in capsys.readouterr().err
