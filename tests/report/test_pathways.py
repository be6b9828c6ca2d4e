"""What attacks break and who takes what, against plain loops; channels that pathways share with a mask."""

import collections
import itertools

import numpy as np
import pytest

from advmoe_jax.report import overlap, pathways
from advmoe_jax.report.overlap import Overlap
from advmoe_jax.report.pathways import Answers

COUNT, LAYERS, EXPERTS, CLASSES = 60, 3, 3, 4


def _answers(seed):
    numbers = np.random.default_rng(seed)
    return Answers(numbers.integers(0, CLASSES, COUNT), numbers.integers(0, EXPERTS, (COUNT, LAYERS)))


@pytest.fixture
def case():
    """Labels, clean answers of which three in four are right, and attacked ones that agree with them here and there."""
    y, clean, attacked = np.random.default_rng(0).integers(0, CLASSES, COUNT), _answers(1), _answers(2)
    clean.labels[15:] = y[15:]
    attacked.labels[:30] = clean.labels[:30]
    attacked.experts[10:40] = clean.experts[10:40]
    return y, clean, attacked


def test_a_dissection_counts_every_image_once(case):
    y, clean, attacked = case
    counts = collections.Counter()
    for label, before, after, path, other in zip(y, clean.labels, attacked.labels, clean.experts, attacked.experts):
        predictor, router = before != label or after != label, any(a != b for a, b in zip(path, other))
        counts[{(False, False): "neither", (False, True): "router", (True, False): "pathway"}.get(
            (predictor, router), "both")] += 1
    found = pathways.dissection(*case)
    assert {name: found[name] for name in pathways.CATEGORIES} == counts and len(counts) == 4
    assert sum(counts.values()) == COUNT
    assert found["ra"] == (counts["neither"] + counts["router"]) / COUNT
    assert found["ra"] == np.mean((clean.labels == y) & (attacked.labels == y))
    assert found["router_robust"] == (counts["neither"] + counts["pathway"]) / COUNT
    assert found["flip_rate"] == [np.mean(clean.experts[:, i] != attacked.experts[:, i]) for i in range(LAYERS)]


def test_an_image_that_is_wrong_when_clean_counts_as_broken():
    """Also where the attacked one happens to be right."""
    clean, attacked = Answers(np.array([1]), np.zeros((1, 2), int)), Answers(np.array([0]), np.zeros((1, 2), int))
    assert pathways.dissection(np.array([0]), clean, attacked)["pathway"] == 1


def test_the_worst_of_several_attacks(case):
    """RA is that of the worst case per image; of those that break the predictor one that turns the router too is taken,
    and where none breaks it one that turns the router."""
    y, clean, first = case
    several = [first, clean, _answers(3), _answers(4)]
    chosen = pathways.worst(y, clean, several)
    of = [pathways.broken(y, clean, attacked) for attacked in several]
    for i, number in enumerate(chosen):
        predictor, router = of[number][0][i], of[number][1][i]
        assert predictor == any(p[i] for p, _ in of)
        rivals = [r[i] for p, r in of if p[i] == predictor]
        assert router == any(rivals)
        assert number == min(n for n, (p, r) in enumerate(of) if (p[i], r[i]) == (predictor, router))


def test_who_takes_what():
    y, experts = np.random.default_rng(5).integers(0, CLASSES - 1, COUNT), _answers(6).experts  # a class has no images
    experts[:20] = experts[0]
    found = pathways.statistics(experts, y, EXPERTS, CLASSES)
    taken = collections.Counter(map(tuple, experts))
    for layer, expert in itertools.product(range(LAYERS), range(EXPERTS)):
        takes = experts[:, layer] == expert
        assert found["load"][layer][expert] == pytest.approx(takes.mean())
        for label in range(CLASSES - 1):
            assert found["by_class"][label][layer][expert] == pytest.approx(takes[y == label].mean())
    assert not np.any(found["by_class"][CLASSES - 1])
    shares = np.array(found["load"])
    np.testing.assert_allclose(found["load_entropy"], -np.sum(shares * np.log(shares), 1) / np.log(EXPERTS), rtol=1e-5)
    assert found["distinct"] == len(taken) and found["possible"] == EXPERTS**LAYERS
    assert tuple(found["common"]) == taken.most_common(1)[0][0]
    assert found["common_share"] == pytest.approx(taken.most_common(1)[0][1] / COUNT)
    entropy = -sum(n / COUNT * np.log2(n / COUNT) for n in taken.values())
    assert found["effective"] == pytest.approx(2**entropy)


@pytest.mark.parametrize("paths, effective", [([[0, 1]] * 4, 1), ([[0, 0], [0, 1], [1, 0], [1, 1]], 4)])
def test_effective_pathways(paths, effective):
    assert pathways.statistics(np.array(paths), np.zeros(4, int), 2, 1)["effective"] == pytest.approx(effective)


def _random(rng, sizes, keep):
    """Masks of the channels of each layer, floor(keep * C) of them kept."""
    return [rng.permutation(np.arange(size) < int(keep * size)) for size in sizes]


def _overlap(masks, starts, widths):
    shared = np.array([[mask[start:start + width].sum() for start in of]
                       for mask, of, width in zip(masks, starts, widths)])
    return Overlap(shared, np.array(widths), np.array([mask.sum() for mask in masks]), np.array(list(map(len, masks))))


def test_iou_is_that_of_sets_of_channels():
    """Three experts whose windows overlap."""
    masks = _random(np.random.default_rng(0), (8, 16, 8), 0.6)
    starts, widths = [(0, 2, 4), (0, 4, 8), (0, 2, 4)], (4, 8, 4)
    found, experts = _overlap(masks, starts, widths), _answers(7).experts
    kept = {(layer, channel) for layer, mask in enumerate(masks) for channel in np.flatnonzero(mask)}
    for score, path in zip(found.iou(experts), experts):
        mine = {(layer, starts[layer][expert] + i) for layer, expert in enumerate(path) for i in range(widths[layer])}
        assert score == pytest.approx(len(mine & kept) / len(mine | kept)) and 0 <= score <= 1


def test_one_choice_of_two_experts_has_two_scores():
    """a of the h channels that the mask keeps are the first expert's: a / (2 h - a) and (h - a) / (h + a)."""
    sizes = (8, 16, 16)
    masks = _random(np.random.default_rng(1), sizes, 0.5)
    found = _overlap(masks, [(0, size // 2) for size in sizes], [size // 2 for size in sizes])
    scores = found.iou(np.random.default_rng(2).integers(0, 2, (50, 1)))
    h, a = sum(sizes) // 2, sum(mask[:len(mask) // 2].sum() for mask in masks)
    assert a != h - a and sorted(set(scores)) == pytest.approx(sorted([a / (2 * h - a), (h - a) / (h + a)]))


@pytest.mark.parametrize("keep, expected", [(0.5, 1 / 3), (0.25, None)])
def test_random_masks_tend_to_chance(keep, expected):
    """Halves against halves share a third."""
    rng, sizes = np.random.default_rng(3), (64, 128, 128)
    starts, widths = [(0, size // 2) for size in sizes], [size // 2 for size in sizes]
    experts, scores = rng.integers(0, 2, (20, len(sizes))), []
    for _ in range(50):
        found = _overlap(_random(rng, sizes, keep), starts, widths)
        scores.append(found.iou(experts).mean())
    assert np.mean(scores) == pytest.approx(found.chance, abs=0.01)
    assert expected is None or found.chance == pytest.approx(expected)
    full = _overlap([np.ones(size, bool) for size in sizes], starts, widths)
    assert full.chance == pytest.approx(0.5) and set(full.iou(experts)) == {0.5}


def test_densities_have_all_images_and_what_they_share():
    clean, attacked = np.array([0.29, 0.3, 1.0, 0.305]), np.array([0.3, 0.3, 0.0, 0.999])
    found = overlap.distribution(clean, attacked)
    for scores, of in ((clean, found["clean"]), (attacked, found["attacked"])):
        assert sum(of["counts"]) == 4 and of["mean"] == pytest.approx(scores.mean())
        starts = found["start"] + found["step"] * np.arange(len(of["counts"]))
        assert all(np.any((starts - 1e-9 <= s) & (s < starts + found["step"] + 1e-9)) for s in scores)
    assert (found["clean"]["values"], found["attacked"]["values"]) == (4, 3)
    assert overlap.distribution(clean, clean)["common"] == pytest.approx(1)
    assert overlap.distribution(clean[:2], attacked[3:])["common"] == 0
