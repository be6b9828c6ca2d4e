"""SR-GKP against its golden facts, and against a slow version that follows the algorithm word by word."""

import hashlib
import json
import math
import pathlib

import numpy as np
import pytest

from advmoe_jax.core.errors import UserError
from advmoe_jax.pruning import srgkp

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "srgkp_resnet20.json").read_text())
WEIGHTS = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "weights" / "resnet20-12fca82f.th"
TOY = (((np.arange(288) * 37) % 101) - 50).reshape(8, 4, 3, 3).transpose(2, 3, 1, 0) / 50
POINTS = np.abs(np.subtract.outer([0, 1, 3, 6, 10], [0, 1, 3, 6, 10])).astype(float)
ROUGH = np.array([5., 1, 4, 2, 3])


def test_roughness():
    nine = np.arange(1, 10).reshape(3, 3, 1, 1)
    delta = np.zeros((3, 3, 1, 1))
    delta[1, 1] = 1
    for power, of_nine in ((1, 96), (2, 960)):
        assert srgkp.roughness(nine, power) == of_nine and srgkp.roughness(delta, power) == 16
        assert srgkp.roughness(np.ones((3, 3, 1, 1)), power) == 0
    kernel = np.random.default_rng(0).normal(size=(3, 3, 2, 3))
    found = srgkp.roughness(kernel)
    np.testing.assert_allclose(srgkp.roughness(-2 * kernel), 4 * found)
    for turned in (kernel[::-1], kernel[:, ::-1], kernel.swapaxes(0, 1)):
        np.testing.assert_allclose(srgkp.roughness(turned), found)


@pytest.mark.parametrize("scores, labels", [
    (np.arange(12), [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]), ([7, 3, 9, 1, 4, 8, 2, 6], [2, 2, 0, 0, 3, 1, 1, 3])])
def test_snaking(scores, labels):
    found = srgkp._labels(np.asarray(scores), 4, "snaking", None)
    assert found.tolist() == labels


def test_a_toy_layer():
    order, kept = srgkp.plan(TOY, groups=4, rate="1/2")
    assert order.tolist() == [2, 3, 6, 7, 0, 4, 1, 5] and kept == ((0, 2), (0, 2), (1, 3), (0, 2))


@pytest.mark.parametrize("settings, best", [
    (dict(alpha=.9), {0, 3, 4}), (dict(alpha=.5), {0, 3, 4}), (dict(alpha=1), {0, 3, 4}), (dict(alpha=0), {1, 3, 4}),
    (dict(beta_mode="sticky"), {0, 3, 4}), (dict(beta_mode="sticky", check_step=2), {0, 3, 4}),
    (dict(beta_mode="sticky", check_step=3), {0, 2, 4})])
def test_the_beam_on_five_points(settings, best):
    given = dict(width=2, check_step=1, alpha=.9, beta_mode="fresh", final="cost") | settings
    assert set(srgkp._search(1 - POINTS, ROUGH, 3, **given)) == best


def _slow(similarity, rough, keep, width, check_step, alpha, beta_mode, final):
    """One selection at a time, sums anew for each."""
    channels, sticky, finals = len(similarity), None, []

    def cost(chosen):
        inner = sum(similarity[a, b] for i, a in enumerate(chosen) for b in chosen[:i])
        outer = sum(max(similarity[s, p] for s in chosen) for p in range(channels) if p not in chosen)
        fresh = math.comb(len(chosen), 2) / (channels - len(chosen)) if len(chosen) < channels else 0
        return inner - (fresh if sticky is None or beta_mode == "fresh" else sticky) * outer

    for start in range(channels):
        beam = [(start,)]
        while len(beam[0]) < keep:
            beam = [chosen + (x,) for chosen in beam for x in sorted(
                set(range(channels)) - set(chosen), key=lambda x: (sum(similarity[a, x] for a in chosen), x))[:width]]
            count = len(beam[0])
            if (count - 1) % check_step == 0:
                costs = [cost(chosen) for chosen in beam]
                if sticky is None:
                    sticky = math.comb(count, 2) / (channels - count) if count < channels else 0
                by_cost = sorted(range(len(beam)), key=lambda b: -costs[b])
                by_rough = sorted(by_cost, key=lambda b: -sum(rough[c] for c in beam[b]))
                score = {b: alpha * by_cost.index(b) + (1 - alpha) * by_rough.index(b) for b in by_rough}
                beam = [beam[b] for b in sorted(by_rough, key=lambda b: -score[b])[:width]]
        finals += beam
    return min(finals, key=cost if final == "cost" else lambda chosen: sum(rough[c] for c in chosen))


@pytest.mark.parametrize("final", srgkp.FINALS)
@pytest.mark.parametrize("beta_mode", srgkp.BETAS)
@pytest.mark.parametrize("width, check_step", [(2, 3), (2, 2), (3, 2), (1, 99)])
def test_the_search_is_the_slow_one(width, check_step, beta_mode, final):
    generator = np.random.default_rng(width)
    for channels, keep in ((7, 4), (9, 7), (6, 6)):
        points, rough = generator.normal(size=(channels, 5)), generator.uniform(size=channels)
        similarity = 1 - np.linalg.norm(points[:, None] - points, axis=-1)
        given = (similarity, rough, keep, width, check_step, .9, beta_mode, final)
        assert sorted(srgkp._search(*given)) == sorted(_slow(*given))


@pytest.mark.skipif(not WEIGHTS.is_file(), reason="needs the weights resnet20-12fca82f.th")
@pytest.mark.parametrize("key", [key for key in GOLDEN if "|" in key])
def test_the_released_resnet20(key):
    torch = pytest.importorskip("torch")
    weights = torch.load(WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    _, rate, beta_mode = key.split("|")
    layers = [layer for layer in GOLDEN[key]["layers"] if "layer1" in layer[0] or "layer3.2" in layer[0]]
    digest = hashlib.sha256()
    for name, order, kept in layers:
        found = srgkp.plan(weights[f"module.{name}"].numpy().transpose(2, 3, 1, 0), rate=rate, beta_mode=beta_mode)
        digest.update(json.dumps([name, found.order.tolist(), found.kept], separators=(",", ":")).encode())
    expected = b"".join(json.dumps(layer, separators=(",", ":")).encode() for layer in layers)
    assert digest.hexdigest() == hashlib.sha256(expected).hexdigest()


def test_a_mask_is_its_plan():
    found = srgkp.plan(TOY, groups=4, rate="1/2")
    mask = srgkp.mask(found, 4)
    assert mask.shape == (1, 1, 4, 8) and np.all(mask.sum(2) == 2)
    for position, filters in enumerate(found.order.reshape(4, 2)):
        for filter in filters:
            assert tuple(np.flatnonzero(mask[0, 0, :, filter])) == found.kept[position]


def test_trivial_versions():
    """Groups at random, the smoothest alone, channels at random; 1x1 kernels have no smoothness."""
    smooth = srgkp.plan(TOY, groups=2, rate="1/2", search="least_smooth")
    for filters, kept in zip(smooth.order.reshape(2, 4), smooth.kept):
        rough = srgkp.roughness(TOY)[:, filters].sum(1)
        assert set(kept) == set(np.argsort(rough)[:2])
    one, other = (srgkp.plan(TOY, groups=2, rate="1/2", grouping="random", search="random", seed=seed)
                  for seed in (0, 3))
    assert one.order.tolist() != other.order.tolist() and all(len(kept) == 2 for kept in one.kept)
    flat = np.random.default_rng(0).normal(size=(1, 1, 6, 4))
    found = srgkp.plan(flat, groups=2, rate="1/2")
    by_sum = np.argsort(-flat.sum((0, 1, 2)), kind="stable")
    assert set(found.order[:2]) == {by_sum[0], by_sum[3]}


@pytest.mark.parametrize("change, message", [
    (dict(groups=3), "divisor of the layer's 8 filters"), (dict(rate="1/3"), "whole number"),
    (dict(rate=0), "more than 0"), (dict(rate=1), "less than 1"),
    (dict(rate="x"), "rate is 'x'"), (dict(beta_mode="auto"), "beta_mode"),
    (dict(search="beams"), "beam"), (dict(kernel=np.ones((5, 5, 4, 8))), "expected \\(3, 3")])
def test_what_cannot_be_planned(change, message):
    given = dict(kernel=TOY, groups=4, rate="1/2") | change
    with pytest.raises(UserError, match=message):
        srgkp.plan(given.pop("kernel"), **given)
