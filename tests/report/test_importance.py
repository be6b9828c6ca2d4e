"""What networks hold important: scores of finished runs, node by node, and how alike they rank weights."""

import json

import jax
import numpy as np
import pytest
from scipy.stats import spearmanr

from advmoe_jax.core import config as configs
from advmoe_jax.core import status, tree
from advmoe_jax.core.layer_spec import dotted
from advmoe_jax.interop import finished
from advmoe_jax.models import model as models
from advmoe_jax.report import importance

pytestmark = pytest.mark.usefixtures("tiny_resnet")
NAMES = ("clean", "attacked", "both")


def _run(folder, seed, **fields):
    """A finished run of random weights."""
    config = configs.default(data="digits")
    for name, value in {"model.num_experts": 1, "model.model_scale": 1.0, "model.depth": 4, "model.width": 4,
                        "attack.eps": "0.1", **fields}.items():
        configs.override(config, f"{name}={value}")
    config = configs.complete(config)
    config.name = folder.name
    model = models.make(config.model, (8, 8, 1), 10)
    finished.write(folder, config, jax.device_get(jax.jit(model.init)(jax.random.key(seed))), {})
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs, of which the last has the weights of the first, what was found in them, and one of their models."""
    root = tmp_path_factory.mktemp("importance")
    for seed, name in zip((0, 1, 0), NAMES):
        model = _run(root / name, seed)
    code = importance.main(["--workdir", *(str(root / name) for name in NAMES), "--out", str(root / "out"), "--images",
                            "4", "--attack", "fgsm"])
    return root, code, json.loads((root / "out" / "importance.json").read_text()), model


def test_nodes_and_ranks_are_those_of_the_scores(made):
    root, code, found, model = made
    assert code == 0 and list(found["runs"]) == list(NAMES) and found["runs"]["both"]["step"] == 0
    assert found["scores"] == ["nis", "erm", "ase", "bnsf"] and found["images"] == 4
    leaves = [tree.named_leaves(jax.device_get(model.init(jax.random.key(seed))["params"])) for seed in (0, 1)]
    kernels = [{dotted(spec.path): np.abs(of[f"{spec.path}/kernel"]) for spec in model.layers} for of in leaves]
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
    _run(tmp_path / "wide", 0, **{"model.width": 8})
    _run(tmp_path / "clean", 0)
    for other, said in (("wide", "of another architecture"), ("clean", "another run of that name")):
        assert importance.main(["--workdir", str(root / "clean"), str(tmp_path / other), "--out", str(tmp_path)]) == 2
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1
    status.write(tmp_path / "wide", "training")
    assert importance.main(["--workdir", str(tmp_path / "wide"), "--out", str(tmp_path)]) == 2
    assert "has not finished training" in capsys.readouterr().err
