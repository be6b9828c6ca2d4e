"""The matrix of a recipe: attacks down, runs across, unions last, and columns that know the attack."""

import numpy as np
import pytest
from fabricated import entry, workdir

from advmoe_jax.core import config as configs
from advmoe_jax.core import recipe, status
from advmoe_jax.core.recipe import Recipe
from advmoe_jax.evaluation import results
from advmoe_jax.report import matrix, reports, runs

ATTACKS = (("pgd-20", "linf", "0.1"), ("pgd-20", "l2", "0.5"), ("fog", "", ""))
LABEL = np.array([0, 1, 2, 3])
RIGHT = {  # who is right: clean, then under each attack by each of two gradients
    "a": ("1111", "1110 1100", "1000 1000", "0000 0000"),
    "b": ("1110", "0000 1000", "1110 0110", "0111 0111")}


def _rows(bits, among):
    return np.array([bit == "1" for bit in bits]) & among


def _measured(root, name, seed=0, own=(), **config):
    """A run of which each image is known."""
    clean, *attacked = RIGHT[name[0]]
    right = _rows(clean, np.ones(4, bool))
    stands = [[_rows(bits, right | (not norm)) for bits in views.split()]  # fog gets all images
              for views, (_, norm, _) in zip(attacked, ATTACKS)]
    by_attack = [{"attack": label, "norm": norm, "eps": eps, "ra": float((right & np.all(views, 0)).mean())}
                 | ({} if norm else {"accuracy": float(np.all(views, 0).mean())})
                 for (label, norm, eps), views in zip(ATTACKS, stands)]
    attempts = [{"attack": label, "view": str(i), "ra": float((right & view).mean()),
                 **({} if norm else {"accuracy": float(view.mean())}),
                 "settings": {"norm": norm, "eps": eps} if norm else {"t": "0.4"}}
                for (label, norm, eps), views in zip(ATTACKS, stands) for i, view in enumerate(views)]
    every = right & np.all([view for views in stands for view in views], 0)
    union = float(np.all([view for views in stands[:2] for view in views], 0).mean())
    record = entry(sa=float(right.mean()), ra=float(every.mean()), n=4, train_seed=seed, routed=False) | {
        "attack": "three", "norm": "", "eps": "", "settings": {"0": "x"}, "attempts": attempts,
        "by_attack": by_attack + list(own), "unions": {"all PGD": union}}
    folder = workdir(root / name, [record], seed=seed, run=name, **config)
    place = folder / "eval" / results.entry_id(record)
    place.mkdir(parents=True)
    wrong = (LABEL + 1) % 4
    np.savez(place / "examples.npz", label=LABEL, clean_prediction=np.where(right, LABEL, wrong),
             adversarial_prediction=np.stack([np.where(view, LABEL, wrong) for views in stands for view in views]))
    status.write(folder, "finished", 5)


@pytest.fixture
def root(tmp_path):
    names = ("a-s0", "a-s1", "b-s0", "b-s1")
    chosen = Recipe(dict.fromkeys(names, configs.default()), "Matrix", {"A": names[:2], "B": names[2:]},
                    oracles={"oracle": names})
    recipe.write(chosen, tmp_path)
    for name in names:
        _measured(tmp_path, name, seed=int(name[-1]))
    return tmp_path


def _table(root, oracles=None):
    stored = recipe.read(root)
    labels = {str(root / name): label for label, names in stored["rows"].items() for name in names}
    [found] = matrix.of([runs.load(root / name) for name in stored["runs"]], labels,
                        stored["oracles"] if oracles is None else oracles)
    return found


def test_attacks_down_and_runs_across(root):
    found = _table(root)
    assert found.columns == ("A", "B", "oracle")
    assert found.rows == ("clean", "pgd-20 linf", "pgd-20 l2", "fog", "all PGD", "all")
    np.testing.assert_allclose(found.rates[:, 0], [100, 50, 25, 0, 25, 0])
    np.testing.assert_allclose(found.rates[:, 1], [75, 0, 50, 75, 0, 0])
    assert found.table.rows[1] == ("pgd-20 linf", "50.00 ± 0.00", "0.00 ± 0.00", "50.00 ± 0.00")


def test_an_oracle_takes_the_best_run_for_each_attack(root):
    """Image by image: a stands clean and linf, b l2 and fog, where an
    image that it gets wrong when clean counts; only image 1 is right under all that were chosen."""
    np.testing.assert_allclose(_table(root).rates[:, 2], [100, 50, 50, 75, 25, 25])
    assert "a ceiling that no model reaches" in _table(root).table.notes[-1]
    assert _table(root, {}).columns == ("A", "B")
    assert _table(root, {"late": ("a-s0", "late")}).columns == ("A", "B"), "not all of its runs were measured"


def test_extra_data_are_told(tmp_path):
    for name, config in (("a", {"data.extra": "1m.npz"}), ("b", {})):
        _measured(tmp_path, name, **config)
    [found] = matrix.of([runs.load(tmp_path / name) for name in ("a", "b")])
    assert found.columns == ("a", "b") and found.table.columns == ("attack", "a (extra data: 1m.npz 70 %)", "b")
    assert found.table.notes[-1].endswith("the data set's images: a (extra data: 1m.npz 70 %).")


def test_unions_are_no_larger_than_their_rows(root):
    rates = _table(root).rates
    assert np.all(rates[4] <= rates[1:3].min(0)) and np.all(rates[5] <= rates[:5].min(0))


def test_attacks_that_some_models_cannot_take(root, tmp_path):
    own = ({"attack": "lead-20", "norm": "l2", "eps": "0.5", "ra": 0.25},)
    (root / "a-s0" / "results.json").unlink()
    for path in (root / "a-s0" / "eval").rglob("*.npz"):
        path.rename(path.with_suffix(".old"))
    (root / "a-s0" / "eval").rename(root / "a-s0" / "old")
    _measured(root, "a-s0", own=own)
    found = _table(root, {})
    assert found.rows[4] == "lead-20 l2" and found.rates[4, 0] == 25 and np.isnan(found.rates[4, 1])
    assert found.table.rows[4][1:] == ("25.00 (1 of 2)", "-")


def test_the_report_of_a_recipe_has_it_with_a_heat_map(root):
    reports.write([root])
    text = (root / "report.md").read_text()
    assert "### three, 4 test images of digits" in text and "](matrix.png)" in text
    assert (root / "matrix.png").read_bytes().startswith(b"\x89PNG")


def test_a_paper_s_numbers_stand_behind_ours(root):
    labels = {str(root / name): name for name in ("a-s0", "b-s0")}
    [found] = matrix.of([runs.load(root / name) for name in ("a-s0", "b-s0")], labels,
                        paper={"a-s0": {"clean": 87.11, "all PGD": 44.2, "RA": 1}})
    assert found.table.rows[0][1:] == ("100.00 (paper 87.11)", "75.00")
    assert found.table.rows[4][1:] == ("25.00 (paper 44.20)", "0.00") and "(paper 1" not in str(found.table)


def test_one_run_makes_no_matrix(root):
    assert matrix.of([runs.load(root / "a-s0")]) == []
