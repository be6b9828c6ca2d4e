"""Noise, weather, rotations and corruptions: golden pixels, statistics, and searches against what can be found."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from scipy import ndimage

from advmoe_jax.attacks import corruption, driver, gaussian_noise, parse, rotation, salt_pepper, snow, spatial
from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import balls, colour, filters, losses, warp

SOME_KINDS = slow_but(lambda kind: kind in ("shot_noise", "snow", "pixelate"), corruption.KINDS)


def _run(name, x, model=None, y=None, key=0, **settings):
    """With one key for each image, folded from its position."""
    return parse.attack(name, **settings).run(model, _keys(len(x), key), jnp.asarray(x, jnp.float32), y)


def _keys(n, key=0):
    return rng.per_example(jax.random.key(key), jnp.arange(n))


def _levels(x):
    """Images as whole numbers; they must be."""
    levels = np.round(np.asarray(x, np.float64) * 255)
    np.testing.assert_allclose(np.asarray(x) * 255, levels, atol=1e-3)
    return levels


def _ramp(channels=1):
    """(1, 16, 16, C): every grey level once."""
    return np.repeat(np.arange(256).reshape(1, 16, 16, 1) / 255, channels, -1).astype(np.float32)


def _mlp(weights, x):
    return jnp.tanh(x.reshape(x.shape[0], -1) @ weights[0]) @ weights[1]


@functools.cache
def _case(n=32, shape=(6, 6, 1)):
    """A small network, images, and its labels for them, some of them wrong."""
    numbers = np.random.default_rng(0)
    d = np.prod(shape)
    weights = numbers.standard_normal((d, 8)) / np.sqrt(d), numbers.standard_normal((8, 3))
    model = jax.tree_util.Partial(_mlp, tuple(jnp.asarray(w, jnp.float32) for w in weights))
    x = jnp.asarray(numbers.uniform(0, 1, (n, *shape)), jnp.float32)
    return model, x, jnp.argmax(model(x), -1).at[:2].add(1) % 3


def _outcome(model, x_adv, y):
    logits = model(x_adv)
    return np.asarray(jnp.argmax(logits, -1) != y), np.asarray(losses.cross_entropy(logits, y))


# Fog


@pytest.mark.parametrize("t, light, overflow, pixels", [
    (0.4, 1.2, "wrap", {0: 183, 64: 208, 128: 234, 178: 254, 179: 255, 181: 255, 182: 0, 200: 7, 255: 29}),
    (0.4, 1.2, "clip", {0: 183, 181: 255, 182: 255, 200: 255, 255: 255}),
    (2.0, 1.0, "wrap", {0: 224, 128: 239, 255: 255}),
    (1.5, 1.2, "wrap", {0: 250, 64: 5}),
])
def test_golden_fog(t, light, overflow, pixels):
    foggy = _levels(_run("fog", _ramp(), t=t, light=light, overflow=overflow)).ravel()
    assert {level: foggy[level] for level in pixels} == pixels


def test_fog_defaults_are_those_of_mol_and_all_images_are_alike():
    x = np.repeat(_ramp(3), 2, 0)
    foggy = _run("fog", x)
    np.testing.assert_array_equal(foggy, _run("fog", x, key=1, t=0.4, light=1.2, overflow="wrap"))
    np.testing.assert_array_equal(foggy[0], foggy[1])


def test_every_byte_survives():
    levels = np.arange(256)
    x = np.float32(levels / 255)
    for u in (x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(1))):  # divisions differ in rounding
        np.testing.assert_array_equal(jax.jit(colour.to_bytes)(u), levels)


# Snow


@pytest.mark.parametrize("channels", [1, 3])
def test_golden_snow_on_grey(channels):
    x = np.repeat(_ramp(channels), 64, 0)
    points = np.asarray(snow.snow_points(_keys(64)))
    assert points.min() >= 85 and points.max() <= 212.5 and points.min() < 95 and points.max() > 200
    levels = np.arange(256).reshape(1, 16, 16, 1)
    expected = np.where(levels < points.reshape(-1, 1, 1, 1), np.minimum(8 * levels, 255), levels)
    np.testing.assert_array_equal(_levels(_run("snow", x)), np.broadcast_to(expected, x.shape))
    flat = expected[np.argmax(points)].ravel()
    assert (flat[10], flat[31], flat[32], flat[250]) == (80, 248, 255, 250)


def test_golden_snow_on_colours():
    x = np.broadcast_to(np.float32([[200, 100, 0], [20, 10, 0]]) / 255, (64, 1, 2, 3))
    above = np.asarray(snow.snow_points(_keys(64))) > 100
    assert 10 < above.sum() < 64
    snowy = _levels(_run("snow", x))
    np.testing.assert_array_equal(snowy[above, 0, 0], np.full((above.sum(), 3), 255))
    assert np.abs(snowy[~above, 0, 0] - [200, 100, 0]).max() <= 2
    assert np.abs(snowy[:, 0, 1] - [160, 80, 0]).max() <= 2


def test_snow_that_multiplies_by_1_leaves_greys_and_nearly_all_colours():
    """8-bit lightness and saturation lose up to 5 levels of nearly white and nearly black colours, OpenCV's too."""
    np.testing.assert_array_equal(_levels(_run("snow", _ramp(3), multiplier=1)), _levels(_ramp(3)))
    x = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3))
    change = np.abs(_levels(_run("snow", x / 255, multiplier=1)) - x)
    assert change.max() <= 5 and np.mean(change > 2) < 0.05


def test_hls_is_that_of_the_standard_library():
    rgb = np.random.default_rng(1).integers(0, 256, (300, 3))
    expected = np.array([colorsys.rgb_to_hls(*pixel) for pixel in rgb / 255]) * [180, 255, 255]
    found = np.asarray(jax.jit(colour.to_hls)(jnp.asarray(rgb, jnp.float32)))
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    back = np.array([colorsys.hls_to_rgb(*pixel) for pixel in found / [180, 255, 255]]) * 255
    assert np.abs(np.asarray(jax.jit(colour.to_rgb)(jnp.asarray(found))) - back).max() <= 0.5 + 1e-3


# Rotation


@pytest.mark.parametrize("shape", [(6, 6, 1), (5, 5, 3), (5, 8, 2), (32, 32, 3)])
def test_golden_rotation(shape):
    x = np.random.default_rng(0).uniform(size=(2, *shape)).astype(np.float32)
    for degrees in (180.0, -180.0):
        np.testing.assert_array_equal(rotation.rotate(x, jnp.full(2, degrees)), x[:, ::-1, ::-1])
    np.testing.assert_array_equal(rotation.rotate(x, jnp.zeros(2)), x)
    np.testing.assert_array_equal(_run("rotation", x, limit=0), x)
    if shape[0] == shape[1]:
        np.testing.assert_array_equal(rotation.rotate(x, jnp.asarray([90.0, -90.0])),
                                      np.stack([np.rot90(x[0]), np.rot90(x[1], -1)]))


def test_rotation_takes_pixels_as_they_are_and_zeros_from_outside():
    x = np.random.default_rng(0).uniform(0.1, 1, (1, 9, 9, 1)).astype(np.float32)
    turned = np.asarray(rotation.rotate(x, jnp.asarray([45.0])))
    assert np.all(turned[0, [0, 0, -1, -1], [0, -1, 0, -1]] == 0) and turned[0, 4, 4] == x[0, 4, 4]
    assert set(turned.ravel()) <= {0, *x.ravel()}


@pytest.mark.parametrize("limit", [180, 30])
def test_angles_are_uniform_and_one_for_each_image(limit):
    degrees = np.asarray(rotation.angles(_keys(4000), limit))
    assert np.abs(degrees).max() <= limit and len(set(degrees)) > 3900
    assert abs(degrees.mean()) < 0.05 * limit
    np.testing.assert_allclose(degrees.std(), limit / np.sqrt(3), rtol=0.03)
    x = np.repeat(np.random.default_rng(0).uniform(size=(1, 8, 8, 1)), 3, 0).astype(np.float32)
    turned = _run("rotation", x, limit=limit)
    np.testing.assert_array_equal(turned, rotation.rotate(x, degrees[:3]))
    assert np.any(turned[0] != turned[1])


def test_warp_is_that_of_scipy():
    """Turned counter-clockwise, then moved down and to the right."""
    numbers = np.random.default_rng(0)
    x = numbers.uniform(size=(6, 7, 9, 2)).astype(np.float32)
    degrees, shift = numbers.uniform(-180, 180, 6), numbers.uniform(-3, 3, (6, 2))
    found = warp.warp(x, jnp.asarray(degrees, jnp.float32), jnp.asarray(shift, jnp.float32), bilinear=True)
    for i in range(6):
        sine, cosine = np.sin(np.deg2rad(degrees[i])), np.cos(np.deg2rad(degrees[i]))
        matrix, middle = np.array([[cosine, sine], [-sine, cosine]]), np.array([3, 4])
        for channel in range(2):
            expected = ndimage.affine_transform(x[i, ..., channel], matrix, middle - matrix @ (middle + shift[i]),
                                                order=1, mode="grid-constant")
            np.testing.assert_allclose(found[i, ..., channel], expected, atol=1e-5)


# Noise of a fixed strength


def test_gaussian_noise_statistics():
    x = jnp.full((16, 32, 32, 3), 0.5).at[8:].set(0)
    noisy = np.asarray(_run("gaussian_noise", x, sigma=0.1, draws=1))
    np.testing.assert_allclose([noisy[:8].mean(), noisy[:8].std()], [0.5, 0.1], rtol=0.02)
    np.testing.assert_allclose([noisy[8:].mean(), np.mean(noisy[8:] == 0)], [0.1 / np.sqrt(2 * np.pi), 0.5], rtol=0.03)
    assert np.abs(np.corrcoef(noisy[0].ravel(), noisy[1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("whole", [True, False])
def test_salt_and_pepper_statistics(whole):
    x = jnp.full((16, 32, 32, 3), 0.5)
    noisy = np.asarray(_run("salt_pepper", x, amount=0.2, draws=1, whole_pixels=whole))
    assert set(noisy.ravel()) == {0, 0.5, 1}
    np.testing.assert_allclose([np.mean(noisy == 0), np.mean(noisy == 1)], [0.1, 0.1], rtol=0.1)
    turned = noisy != 0.5
    share_of_whole = np.mean(turned.all(-1)) / np.mean(turned.any(-1))
    assert share_of_whole == 1 if whole else share_of_whole < 0.1
    np.testing.assert_array_equal(_run("salt_pepper", x, amount=1, draws=1, whole_pixels=whole) != 0.5, True)


@pytest.mark.parametrize("name, settings", [
    ("gaussian_noise", dict(sigma=0.25)), ("salt_pepper", dict(amount=0.15)), ("spatial", dict(degrees=60))])
def test_more_draws_are_never_less_harmful(name, settings):
    """Nor does it matter to the verdicts whether broken images are left alone."""
    model, x, y = _case()
    number = "tries" if name == "spatial" else "draws"
    before, most = (np.zeros(len(x), bool), np.full(len(x), -np.inf)), []
    for n in (2, 3, 6, 20):
        now = _outcome(model, _run(name, x, model, y, **settings, **{number: n}, early_stop=False), y)
        assert np.all(now[0] >= before[0])
        assert np.all((now[1] >= before[1] - 1e-6) | (now[0] > before[0]))
        stopped = _outcome(model, _run(name, x, model, y, **settings, **{number: n}, early_stop=True), y)[0]
        np.testing.assert_array_equal(stopped, now[0])
        before = now
        most.append(now[0].sum())
    assert most[-1] > most[0]


def test_one_draw_is_the_first_of_more():
    x = jnp.full((4, 6, 6, 1), 0.5)
    alike = jax.tree_util.Partial(lambda x: jnp.zeros((x.shape[0], 3)))  # no draw is worse than the first
    once = _run("gaussian_noise", x, sigma=0.1, draws=1)
    np.testing.assert_array_equal(once, _run("gaussian_noise", x, alike, jnp.zeros(4, int), sigma=0.1, draws=5))


# The weakest noise


def _between(bounds, x):
    """Two classes; class 1 where the weighted sum of x - 0.5 is between two values."""
    w, low, high = bounds
    h = (x - 0.5).reshape(x.shape[0], -1) @ w
    h = jnp.minimum(h - low, high - h)
    return jnp.stack([-h, h], -1)


@pytest.mark.parametrize("norm, eps, num_steps, high", [
    ("l2", 3, 20, 1e9), ("l1", 5, 3, 1e9), ("l1", 20, 150, 1e9), ("l2", 1.5, 20, 0.2)])
def test_the_weakest_gaussian_noise_on_a_linear_model(norm, eps, num_steps, high):
    """Along each draw's direction the boundary is where the sum is 0.1; the box is too far to matter.

    Where more noise mends the image again, it is found in ascending order.
    """
    d, n, draws = 64, 12, 6
    w = np.random.default_rng(0).standard_normal(d).astype(np.float32) / 4
    x = jnp.full((n, 8, 8, 1), 0.5)
    model = jax.tree_util.Partial(_between, (jnp.asarray(w), 0.1, high))
    x_adv = _run("gaussian_noise", x, model, jnp.zeros(n, int), norm=norm, eps=eps, draws=draws, num_steps=num_steps)
    directions = np.stack([[jax.random.normal(key, (8, 8, 1)) for key in rng.fold_in(_keys(n), draw)]
                           for draw in range(draws)])
    slopes = directions.reshape(draws, n, d) @ w
    sigma = np.where(slopes > 0, 0.1 / np.maximum(slopes, 1e-9), np.inf)
    size = np.stack([balls.norm(jnp.asarray(each), norm) for each in directions])
    best = np.min(sigma * size, 0)
    assert best.max() < eps and np.argmin(sigma * size, 0).max() > 0
    found = np.asarray(balls.norm(x_adv - x, norm))
    assert np.all(found >= best * (1 - 1e-4)) and np.all(found <= best * 1.0102)
    assert np.all(model(x_adv)[:, 1] > 0)


@pytest.mark.parametrize("norm", salt_pepper.ABOUT.norms)
@pytest.mark.parametrize("whole, channels", [(True, 3), (False, 1)])
def test_the_fewest_pixels_that_a_detector_allows(norm, whole, channels):
    """Seven pixels at least, half of the range each, in all channels."""
    def detector(x):
        count = jnp.sum(jnp.any(jnp.abs(x - 0.5) > 0.4, -1), (1, 2))
        return jnp.stack([6.5 - count, count - 6.5], -1)

    x = jnp.full((16, 8, 8, channels), 0.5)
    x_adv = _run("salt_pepper", x, jax.tree_util.Partial(detector), jnp.zeros(16, int), norm=norm, eps=30,
                 whole_pixels=whole)
    numbers = 7 * channels
    expected = 0.5 * (numbers if norm == "l1" else np.sqrt(numbers))
    np.testing.assert_allclose(balls.norm(x_adv - x, norm), np.full(16, expected), rtol=1e-5)


@pytest.mark.parametrize("name, eps", [("gaussian_noise", 1.5), ("salt_pepper", 2.5)])
def test_a_search_stays_within_eps_and_more_draws_come_nearer(name, eps):
    model, x, y = _case()
    wrong, loss = _outcome(model, x, y)
    before = np.full(len(x), np.inf)
    for draws in (1, 2, 8):
        x_adv = _run(name, x, model, y, norm="l2", eps=eps, draws=draws, num_steps=10)
        broken, found_loss = _outcome(model, x_adv, y)
        size = np.asarray(balls.norm(x_adv - x, "l2"))
        assert np.all(size <= eps * (1 + 1e-5))
        np.testing.assert_array_equal(x_adv[wrong], x[wrong])
        assert np.all((found_loss >= loss - 1e-6) | broken)
        size = np.where(broken, size, np.inf)
        assert np.all(size <= before)
        before = size
    assert wrong.sum() == 2 < np.isfinite(before).sum() < len(x)
    stopped = _outcome(model, _run(name, x, model, y, norm="l2", eps=eps, draws=8, num_steps=10, early_stop=True), y)
    np.testing.assert_array_equal(stopped[0], np.isfinite(before))


def test_images_that_are_wrong_already_cost_no_search():
    model, x, _ = _case()
    with driver.counted() as ledger:
        _run("gaussian_noise", x, model, jnp.argmin(model(x), -1), driver="host")
    assert ledger.executed_forward <= 10 * len(x)


# Rotations and translations


def test_the_grid_has_775_places():
    places = spatial.grid(spatial.Config())
    assert places.shape == (775, 3) and len({tuple(place) for place in places}) == 775
    assert (0, 0, 0) in {tuple(place) for place in places}
    np.testing.assert_array_equal(np.abs(places).max(0), [3, 3, 30])
    assert sorted(set(places[:, 0])) == [-3, -1.5, 0, 1.5, 3] and sorted(set(places[:, 2])) == list(range(-30, 31, 2))
    np.testing.assert_array_equal(spatial.grid(spatial.Config(shifts=1, angles=1)), [[0, 0, 0]])


def test_the_grid_finds_the_one_place_that_breaks_an_image():
    """A bright pixel that must land on another one, which only a translation by (3, -3) does."""
    x = jnp.zeros((2, 12, 12, 1)).at[:, 4, 6].set(1)
    detector = jax.tree_util.Partial(lambda x: jnp.stack([0.99 - x[:, 7, 3, 0], x[:, 7, 3, 0] - 0.99], -1))
    y = jnp.zeros(2, int)
    x_adv = _run("spatial", x, detector, y, angles=5)
    np.testing.assert_allclose(x_adv, jnp.zeros_like(x).at[:, 7, 3].set(1), atol=1e-6)
    assert not np.any(_outcome(detector, _run("spatial", x, detector, y, angles=5, pixels=2), y)[0])


def test_the_grid_is_never_less_harmful_than_leaving_the_image_and_breaks_more_than_random_tries():
    model, x, y = _case()
    smooth = jnp.asarray(ndimage.gaussian_filter(np.asarray(x), (0, 0.7, 0.7, 0)) * 1.5 - 0.25).clip(0, 1)
    y = jnp.argmax(model(smooth), -1)
    clean = _outcome(model, smooth, y)
    grid = _outcome(model, _run("spatial", smooth, model, y, pixels=1, degrees=15, early_stop=False), y)
    assert np.all(grid[0] >= clean[0]) and np.all(grid[1] >= clean[1])
    few = _outcome(model, _run("spatial", smooth, model, y, pixels=1, degrees=15, tries=10, early_stop=False), y)
    assert np.all(grid[0] >= few[0]) and np.mean(grid[1] >= few[1] - 1e-3) > 0.9
    assert 0 < few[0].sum() < grid[0].sum() < len(x)


def test_random_tries_are_in_range_and_differ_between_images():
    """A pixel at the centre of an image lands where it is moved to."""
    x = jnp.zeros((200, 15, 15, 1)).at[:, 7, 7].set(1)
    alike = jax.tree_util.Partial(lambda x: jnp.zeros((x.shape[0], 2)))
    moved = np.asarray(_run("spatial", x, alike, jnp.zeros(200, int), tries=1))[..., 0]
    place = np.stack([(moved * np.arange(-7, 8)[:, None]).sum((1, 2)), (moved * np.arange(-7, 8)).sum((1, 2))], -1)
    place /= moved.sum((1, 2))[:, None]
    assert np.abs(place).max() <= 3.3 and np.abs(place).max() > 2.5 and np.abs(place.mean(0)).max() < 0.4
    assert len({tuple(row) for row in place}) == 200


def test_images_that_the_grid_has_broken_are_left_out():
    model, x, y = _case()
    with driver.counted() as stops:
        stopped = _run("spatial", x, model, y, driver="host")
    with driver.counted() as goes_on:
        worst = _run("spatial", x, model, y, driver="host", early_stop=False)
    np.testing.assert_array_equal(_outcome(model, stopped, y)[0], _outcome(model, worst, y)[0])
    assert goes_on.forward == 775 * len(x) and stops.executed_forward < goes_on.forward / 2


# Corruptions


@functools.cache
def _photos():
    """(8, 32, 32, 3) smooth 8-bit images."""
    noise = np.random.default_rng(0).uniform(size=(8, 32, 32, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 0)) - 0.5
    return (np.round(np.clip(0.5 + 4 * smooth, 0, 1) * 255) / 255).astype(np.float32)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_severities_are_ordered_and_images_8_bit(kind):
    x = _photos()
    distances = []
    for severity in range(1, 6):
        corrupted = _run("corruption", x, kind=kind, severity=severity)
        _levels(corrupted)
        assert corrupted.shape == x.shape and corrupted.min() >= 0 and corrupted.max() <= 1
        distances.append(float(np.mean(balls.norm(corrupted - x, "l2"))))
    assert distances == sorted(distances) and distances[4] > 1.3 * distances[0] > 0


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_corruptions_of_small_grey_images_inside_jit(kind):
    """And an image's random numbers are its own."""
    x = np.repeat(_photos()[:1, 4:9, 6:12, :1], 2, 0)
    attack = parse.attack("corruption", kind=kind, severity=5)
    inside = jax.jit(lambda keys, x: attack.run(None, keys, x, None))(_keys(2), x)
    outside = _run("corruption", x, kind=kind, severity=5)
    assert inside.shape == x.shape and np.mean(np.abs(inside - outside) > 1e-5) < 0.05
    is_random = kind in ("gaussian_noise", "shot_noise", "impulse_noise", "fog", "snow")
    assert np.any(outside[0] != outside[1]) == is_random
    assert np.any(outside != x)


def test_corruption_statistics():
    grey = np.full((16, 32, 32, 3), 0.5, np.float32)
    for severity, (sigma, photons, amount, more) in enumerate(
            [(0.04, 500, 0.01, 0.05), (0.06, 250, 0.02, 0.1), (0.08, 100, 0.03, 0.15), (0.09, 75, 0.05, 0.2),
             (0.10, 50, 0.07, 0.3)], 1):
        def run(kind, x=grey):
            return np.asarray(_run("corruption", x, kind=kind, severity=severity))

        noisy, shot, impulse = run("gaussian_noise"), run("shot_noise"), run("impulse_noise")
        np.testing.assert_allclose([noisy.std(), shot.std()], [sigma, np.sqrt(0.5 / photons)], rtol=0.03)
        np.testing.assert_allclose([noisy.mean(), shot.mean()], [0.498, 0.498], atol=0.003)
        np.testing.assert_allclose([np.mean(impulse == 0), np.mean(impulse == 1)], [amount / 2] * 2, rtol=0.15)
        np.testing.assert_allclose(run("brightness"), grey + more, atol=1 / 255)
        np.testing.assert_allclose(run("brightness", 0 * grey), np.full_like(grey, more), atol=1 / 255)


def test_brightness_keeps_the_hue_and_contrast_the_mean():
    x = _photos()
    brighter = np.asarray(_run("corruption", x, kind="brightness", severity=5), np.float64)
    value, new = x.max(-1, keepdims=True), brighter.max(-1, keepdims=True)
    np.testing.assert_allclose(new, np.minimum(value + 0.3, 1), atol=1.01 / 255)
    kept = (value > 0.3)[..., 0]
    np.testing.assert_allclose((brighter / new)[kept], (x / value)[kept], atol=3 / 255)
    flat = np.asarray(_run("corruption", x, kind="contrast", severity=4))
    mean = x.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(flat, 0.3 * (x - mean) + mean, atol=1.01 / 255)


def test_the_fog_of_a_grey_image_is_between_its_darkest_and_its_brightest():
    for severity, amount in ((1, 0.2), (5, 1.5)):
        foggy = np.asarray(_run("corruption", np.full((4, 32, 32, 1), 0.8, np.float32), kind="fog", severity=severity))
        darkest = 0.8 * 0.8 / (0.8 + amount)
        np.testing.assert_allclose(foggy.min((1, 2, 3)), [darkest] * 4, atol=1.01 / 255)
        np.testing.assert_allclose(foggy.max((1, 2, 3)), [(0.8 + amount) * 0.8 / (0.8 + amount)] * 4, atol=1.01 / 255)


def test_plasma_is_cloudy():
    """Neighbours are alike, across the edges too, and more so the faster the noise decays."""
    steps = []
    for decay in (1.75, 3):
        clouds = np.asarray(jax.vmap(lambda key: filters.plasma(key, 32, decay))(_keys(50)))
        assert np.all(clouds.min((1, 2)) == 0) and np.all(np.abs(clouds.max((1, 2)) - 1) < 1e-6)
        assert 0.4 < clouds.mean() < 0.6
        steps.append([np.abs(clouds - np.roll(clouds, 1, axis)).mean() for axis in (1, 2)])
        assert np.abs(clouds[:, 0] - clouds[:, -1]).mean() < 0.05
    assert np.all(np.array(steps[0]) > 1.3 * np.array(steps[1])) and np.all(np.array(steps) < 0.05)


def test_a_motion_blur_smears_a_pixel_along_its_ray():
    layer = jnp.zeros((21, 21)).at[10, 10].set(1)
    up = np.asarray(filters.motion_blur(layer, 4, 2.0, jnp.float32(-90)))
    weights = np.exp(-np.arange(9) ** 2 / 8)
    np.testing.assert_allclose(up[10:19, 10], weights / weights.sum(), atol=1e-6)
    np.testing.assert_allclose(up.sum(), 1, rtol=1e-5)
    diagonal = np.asarray(filters.motion_blur(layer, 4, 2.0, jnp.float32(-45)))
    np.testing.assert_allclose(np.diag(diagonal[::-1])[10::-1].sum(), 1, rtol=1e-5)


def test_blurs_and_resizings_leave_flat_images():
    x = np.full((1, 32, 32, 3), 100 / 255, np.float32)
    for severity in range(1, 6):
        for kind in ("defocus_blur", "pixelate"):
            np.testing.assert_allclose(_run("corruption", x, kind=kind, severity=severity), x, atol=1.01 / 255)
        kernel = filters.disk_kernel(*corruption.KINDS["defocus_blur"][1][severity - 1])
        np.testing.assert_allclose(kernel.sum(), 1, rtol=1e-6)
        np.testing.assert_allclose(kernel, kernel.T[::-1], atol=1e-12)
    np.testing.assert_allclose(filters.disk_kernel(1, 1e-2), np.pad(ndimage.generate_binary_structure(2, 1) / 5, 1))


def test_pixelate_is_that_of_pillow():
    image = pytest.importorskip("PIL.Image")
    photo = np.uint8(np.round(_photos()[0] * 255))
    for severity, share in enumerate((0.95, 0.9, 0.85, 0.75, 0.65), 1):
        small = image.fromarray(photo).resize((int(32 * share), int(32 * share)), image.Resampling.BOX)
        expected = np.asarray(small.resize((32, 32), image.Resampling.BOX))
        found = _levels(_run("corruption", photo[None] / 255, kind="pixelate", severity=severity))[0]
        np.testing.assert_array_equal(found, expected)
    corner = photo[:6, :6]  # 4 pixels of 6 end halfway between two
    expected = image.fromarray(corner).resize((4, 4), image.Resampling.BOX).resize((6, 6), image.Resampling.BOX)
    found = _levels(_run("corruption", corner[None] / 255, kind="pixelate", severity=4))[0]
    np.testing.assert_array_equal(found, np.asarray(expected))


# Settings


@pytest.mark.parametrize("name, settings, says", [
    ("gaussian_noise", dict(sigma=2), "sigma of gaussian_noise is 2.0: expected 0 to 1"),
    ("gaussian_noise", dict(norm="linf"), "unknown norm of gaussian_noise 'linf'"),
    ("gaussian_noise", dict(draws=0), "draws of gaussian_noise is 0"),
    ("gaussian_noise", dict(num_steps=0), "num_steps of gaussian_noise is 0"),
    ("salt_pepper", dict(amount=-0.1), "amount of salt_pepper is -0.1"),
    ("salt_pepper", dict(driver="gpu"), "unknown driver of salt_pepper"),
    ("fog", dict(overflow="wrapped"), "did you mean 'wrap'"),
    ("fog", dict(light=-1), "light of fog is -1.0: expected 0 to 100"),
    ("fog", dict(t="thick"), "t of fog is 'thick'"),
    ("snow", dict(multiplier=-8), "multiplier of snow is -8.0: expected 0 to"),
    ("rotation", dict(limit=270), "limit of rotation is 270.0: expected 0 to 180"),
    ("spatial", dict(tries=-1), "tries of spatial is -1"),
    ("spatial", dict(shifts=0), "shifts of spatial is 0"),
    ("spatial", dict(pixels=-3), "pixels of spatial is -3.0: expected 0 to"),
    ("spatial", dict(degrees=200), "degrees of spatial is 200.0: expected 0 to 180"),
    ("corruption", dict(kind="fogg"), "did you mean 'fog'"),
    ("corruption", dict(severity=6), "severity of corruption is 6: expected 1 to 5"),
    ("corruption", dict(severity=2.5), "severity of corruption is 2.5"),
])
def test_bad_settings_are_one_line(name, settings, says):
    with pytest.raises(UserError) as failure:
        parse.attack(name, **settings)
    assert says in str(failure.value) and "\n" not in str(failure.value)


def test_snow_wants_one_channel_or_three():
    with pytest.raises(UserError, match="2 channels: expected 1 or 3"):
        _run("snow", np.zeros((1, 4, 4, 2)))


def test_labels():
    assert gaussian_noise.label(gaussian_noise.Config()) == "gaussian-noise"
    assert gaussian_noise.label(gaussian_noise.Config(sigma="1/10", draws=4)) == "gaussian-noise-0.1-worst-of-4"
    assert salt_pepper.label(salt_pepper.Config(amount=0.1, draws=1)) == "salt-pepper-0.1"
    assert spatial.label(spatial.Config(tries=10)) == "spatial-worst-of-10"
    assert corruption.label(corruption.Config("shot_noise", 2)) == "cifar-c-like-shot-noise-2"
