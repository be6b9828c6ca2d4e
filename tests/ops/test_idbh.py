"""IDBH: colours and shapes as Pillow changes them, rectangles that are moved or erased, and how often each occurs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import pipeline
from advmoe_jax.ops import distort, idbh, warp

BYTES = np.random.default_rng(0).integers(20, 200, (3, 32, 24, 3)).astype(np.uint8)
BYTES[0, ..., 1], BYTES[1, :30] = 7, BYTES[1, 30:31]  # a channel of one value, and few levels
X, FACTORS = jnp.asarray(BYTES, jnp.float32) / 255, jnp.array([0.3, 1.0, 1.7])


def _pillow(change):
    return np.stack([np.asarray(change(Image.fromarray(image), i)) for i, image in enumerate(BYTES)]) / 255


@pytest.mark.parametrize("name, enhancer", [
    ("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color),
    ("sharpness", ImageEnhance.Sharpness)])
def test_factors_are_pillows(name, enhancer):
    found = jax.jit(getattr(distort, name))(X, FACTORS)
    expected = _pillow(lambda image, i: enhancer(image).enhance(float(FACTORS[i])))
    np.testing.assert_allclose(found, expected, atol=2 / 255)
    np.testing.assert_allclose(found[1], X[1], atol=1e-6)
    assert np.abs(found[2] - X[2]).max() > 0.1


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_levels_are_pillows(name):
    found = jax.jit(getattr(distort, name))(X)
    expected = _pillow(lambda image, _: getattr(ImageOps, name)(image))
    np.testing.assert_allclose(found, expected, atol=1.01 / 255 if name == "autocontrast" else 1e-6)
    np.testing.assert_array_equal(found[0, ..., 1], X[0, ..., 1])
    assert found[0].max() > 0.99 and np.abs(found[2] - X[2]).max() > 0.1


def test_a_shear_moves_rows_or_columns():
    image, sheared = np.zeros((1, 5, 7, 1), np.float32), jax.jit(warp.shear)
    image[0, :, 3], image[0, 2, :] = 1, 1
    along, down = (np.asarray(sheared(image, jnp.array([slopes])))[0, ..., 0] for slopes in ([1.0, 0], [0, 1.0]))
    np.testing.assert_array_equal(np.argwhere((along == 1) & (np.arange(5)[:, None] != 2)),
                                  [[0, 1], [1, 2], [3, 4], [4, 5]])
    np.testing.assert_array_equal(np.argwhere((down == 1) & (np.arange(7)[None] != 3)),
                                  [[0, 1], [1, 2], [3, 4], [4, 5]])
    np.testing.assert_array_equal(sheared(image, jnp.zeros((1, 2))), image)


def test_a_crop_is_put_down_elsewhere():
    """Rows and columns that are gone are 0 to so many together; what is left is a rectangle of the image, anywhere."""
    count, size, lines = 300, 9, 4
    x = jnp.broadcast_to(jnp.arange(1.0, size * size + 1).reshape(1, size, size, 1), (count, size, size, 1))
    found = np.asarray(jax.jit(idbh.crop_shift, static_argnums=2)(jax.random.key(0), x, lines))[..., 0]
    whole = np.asarray(x[0, ..., 0])
    gone, moves = [], set()
    for image in found:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        place = int(image[rows[0], columns[0]]) - 1
        top, left = divmod(place, size)
        part = whole[top:top + len(rows), left:left + len(columns)]
        np.testing.assert_array_equal(image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], part)
        gone.append((size - len(rows), size - len(columns)))
        moves.add((rows[0] - top, columns[0] - left))
    totals = np.bincount(np.sum(gone, 1), minlength=lines + 1)
    assert len(totals) == lines + 1 and totals.min() > count / (lines + 1) / 2
    for axis in zip(*moves):
        assert {*range(-2, 3)} < {*axis} <= {*range(-4, 5)} and max(map(abs, axis)) > 2
    assert {both for both in gone if sum(both) == lines} == {(k, lines - k) for k in range(lines + 1)}


def test_rectangles_are_erased():
    x = jnp.ones((600, 16, 16, 1))
    found = np.asarray(jax.jit(idbh.random_erasing, static_argnums=(2, 3))(jax.random.key(1), x, 0.5, 0.33))[..., 0]
    erased = [image for image in found if image.min() == 0]
    assert 0.44 < len(erased) / len(found) < 0.56
    sizes = []
    for image in erased:
        rows, columns = (np.flatnonzero((image == 0).any(axis)) for axis in (1, 0))
        assert np.all(image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] == 0)
        assert (image == 0).sum() == len(rows) * len(columns)
        sizes.append((len(rows), len(columns)))
    areas, ratios = np.prod(sizes, 1) / 256, np.divide(*np.transpose(sizes))
    assert 0.01 < areas.min() < 0.04 and 0.28 < areas.max() < 0.38
    assert 0.2 < ratios.min() < 0.45 and 2.4 < ratios.max() < 5
    np.testing.assert_array_equal(idbh.random_erasing(jax.random.key(1), x[:9], 0.0, 0.33), x[:9])


def test_each_operation_has_its_share():
    """Images tell by which they were changed: equal ones, each by one operation of its own strength."""
    count = 640
    x = jnp.broadcast_to(X[2:, :, :], (count, *X.shape[1:]))
    names = tuple(idbh.OPERATIONS)
    policy = idbh.Policy(0, (0.5, 0, 0, 0, 0.25, 0.25, 0, 0), (0.1, 0.2), 5, 0)
    found = np.asarray(jax.jit(idbh.colour_shape, static_argnums=2)(jax.random.key(2), x, policy))
    fixed = {name: np.all(np.abs(found - getattr(distort, name)(x[:1])) < 1e-5, (1, 2, 3))
             for name in ("autocontrast", "equalize")}
    assert names.index("saturation") == 0 and names[4:6] == ("autocontrast", "equalize")
    assert all(0.19 < is_it.mean() < 0.31 for is_it in fixed.values())
    coloured = found[~fixed["autocontrast"] & ~fixed["equalize"]]
    np.testing.assert_allclose(np.mean(np.abs(distort.grey(coloured) - distort.grey(x[:1]))), 0, atol=2e-2)
    assert len({image.tobytes() for image in coloured}) == len(coloured)
    for of in idbh.POLICIES.values():
        assert sum(of.chances) == pytest.approx(1) and len(of.chances) == len(names)


@functools.cache
def _augmented(name, size, channels):
    x = jax.random.uniform(jax.random.key(3), (16, size, size, channels))
    run = jax.jit(functools.partial(idbh.augment, policy=idbh.POLICIES[name]))
    return x, run(jax.random.key(4), x), run(jax.random.key(5), x)


@pytest.mark.parametrize("name, size, channels", [
    ("weak", 8, 1), pytest.param("svhn", 32, 3, marks=pytest.mark.slow)])
def test_a_policy_gives_images(name, size, channels):
    x, found, other = _augmented(name, size, channels)
    assert found.shape == x.shape and found.dtype == x.dtype and 0 <= found.min() and found.max() <= 1
    changed = np.any(np.asarray(found) != np.asarray(x), axis=(1, 2, 3))
    assert changed.mean() > 0.5 and np.any(np.asarray(found) != np.asarray(other))
    assert not np.any(np.all(np.asarray(found) == 0, axis=(1, 2, 3))), "small images keep something too"


def _config(*texts):
    config = configs.default()
    configs.override_all(config, [*texts])
    configs.check(config)
    return config.data


def test_the_field():
    assert pipeline.policy(_config()) is None and pipeline.padding(_config()) == 4
    cfg = _config("data.augment=idbh_strong")
    assert pipeline.policy(cfg).erased == 1 and pipeline.padding(cfg) == 0
    for text in ("data.pad=2", "data.jitter=0.1", "data.turn=3"):
        with pytest.raises(UserError, match="has no effect here: it is for data.augment=crop"):
            _config("data.augment=idbh_weak", text)
    with pytest.raises(UserError, match="data.augment is 'idbh': expected one of crop, idbh_weak|idbh_weak"):
        _config("data.augment=idbh")
