"""How differently the members of a team fail.

Robust Diversity of EED (Jung & Song, CVPR 2025, eq. 12 and 13), after Partridge & Krzanowski, 1997. M members, n
images, T teams.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from advmoe_jax.core.errors import UserError

MOST_TEAMS = 2**21


def robust_diversity(fails: np.ndarray, teams: np.ndarray) -> np.ndarray:
    """1 - p_two / p_one of each team: 1 if no two members ever fail together, 0 if they fail on the same images.

    p_one is the probability that a member drawn at random fails on an image, p_two that two different ones both do.
    Both are sums over pairs of members, so that teams are counted in whole numbers, whatever the order of the members.
    1 - diversity of a team is a weighted mean of that of its pairs: no team has more than its most diverse pair.

    Args:
        fails: (M, n) bool, whether a member fails on an image.
        teams: (T, M) bool, who is in a team, two or more.
    Returns:
        (T,) float64; 1 for a team that never fails.
    Raises:
        UserError: the shapes do not fit, or a team has fewer than two members.
    """
    fails, teams = np.asarray(fails, bool), np.asarray(teams, bool)
    if fails.ndim != 2 or teams.ndim != 2 or teams.shape[1] != len(fails) or not fails.size:
        raise UserError(f"fails have shape {fails.shape} and teams {teams.shape}: expected (M, n) of 1 or more images "
                        "and (T, M)")
    sizes = teams.sum(1)
    if sizes.size and sizes.min() < 2:
        raise UserError(f"a team has {sizes.min()} member(s): expected two or more, diversity is one of pairs")
    together = fails.astype(np.float64) @ fails.T  # whole numbers, exact below 2**53
    members = teams.astype(np.float64)
    one = members @ np.diag(together)
    two = np.sum((members @ together) * members, 1) - one
    return 1 - two / np.where(one > 0, (sizes - 1) * one, 1)


def teams_of(count: int, sizes: Sequence[int] | None = None) -> np.ndarray:
    """Every team of a pool, (T, count) bool, small ones first and then by their members' numbers.

    Args:
        count: members of the pool.
        sizes: of the teams; None: from 2 to all, 2**count - count - 1 teams.
    Raises:
        UserError: there are more than MOST_TEAMS.
    """
    sizes = range(2, count + 1) if sizes is None else sizes
    if sum(math.comb(count, size) for size in sizes) > MOST_TEAMS:
        raise UserError(f"a pool of {count} has over {MOST_TEAMS:,} such teams: expected a smaller pool, or one size")
    chosen = [team for size in sizes for team in itertools.combinations(range(count), size)]
    found = np.zeros((len(chosen), count), bool)
    for row, team in zip(found, chosen):
        row[list(team)] = True
    return found
