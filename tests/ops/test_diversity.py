"""Robust Diversity, by its definition and by pairs."""

import itertools

import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import diversity
from advmoe_jax.ops.diversity import robust_diversity, teams_of


def _by_definition(fails):
    """Eq. 12: by the probabilities that exactly i of the S members fail."""
    size = len(fails)
    p = [np.mean(fails.sum(0) == i) for i in range(size + 1)]
    one = sum(i / size * p[i] for i in range(1, size + 1))
    two = sum(i * (i - 1) / (size * (size - 1)) * p[i] for i in range(1, size + 1))
    return 1 - two / one if one else 1.0


def test_every_team_of_a_pool_by_definition():
    fails = np.random.default_rng(0).random((6, 40)) < np.linspace(0.1, 0.8, 6)[:, None]
    teams = teams_of(6)
    assert len(teams) == 2**6 - 7 and len({tuple(team) for team in teams.tolist()}) == len(teams)
    np.testing.assert_allclose(robust_diversity(fails, teams), [_by_definition(fails[team]) for team in teams],
                               rtol=1e-12)


def test_known_values():
    whole = np.ones((1, 3), bool)
    counts = [1, 1, 2, 3, 0, 0, 0, 0, 0, 0]  # how many of three fail: p = (.2, .1, .1)
    assert robust_diversity(np.arange(3)[:, None] < counts, whole) == pytest.approx(3 / 7)
    pair = np.ones((1, 2), bool)
    assert robust_diversity([[1, 1, 0, 0], [0, 0, 1, 0]], pair) == 1
    assert robust_diversity([[1, 1, 0, 0], [1, 1, 0, 0]], pair) == 0
    assert robust_diversity(np.zeros((2, 4)), pair) == 1, "who never fails"
    both = np.array(list(itertools.product([0, 1], repeat=4))).T  # independent, of rate 1/2
    assert robust_diversity(both, np.ones((1, 4), bool)) == 0.5


def test_the_order_of_the_members_does_not_matter():
    fails = np.random.default_rng(1).random((8, 99)) < 0.3
    teams = teams_of(8, [3, 5])
    order = np.random.default_rng(2).permutation(8)
    assert robust_diversity(fails[order], teams[:, order]).tolist() == robust_diversity(fails, teams).tolist()


def test_no_team_is_more_diverse_than_its_best_pair():
    fails = np.random.default_rng(3).random((7, 50)) < 0.4
    teams, pairs = teams_of(7), teams_of(7, [2])
    of_pairs = robust_diversity(fails, pairs)
    for team, found in zip(teams, robust_diversity(fails, teams)):
        assert found <= max(of_pairs[(pairs & ~team).sum(1) == 0]) + 1e-12


def test_all_teams_of_twelve_at_once():
    fails = np.random.default_rng(0).random((12, 10_000)) < 0.4
    assert robust_diversity(fails, teams_of(12)).shape == (4083,)


@pytest.mark.parametrize("fails, teams, said", [
    (np.ones((3, 4)), np.eye(3), "1 member"), (np.ones((3, 4)), np.ones((1, 2)), "expected"),
    (np.ones(4), np.ones((1, 4)), "expected"), (np.ones((3, 0)), np.ones((1, 3)), "1 or more images")])
def test_bad_input(fails, teams, said):
    with pytest.raises(UserError, match=said):
        robust_diversity(fails, teams)


def test_too_many_teams(monkeypatch):
    monkeypatch.setattr(diversity, "MOST_TEAMS", 10_000)
    with pytest.raises(UserError, match="expected a smaller pool, or one size"):
        teams_of(24)
    assert len(teams_of(24, [3])) == 24 * 23 * 22 / 6
