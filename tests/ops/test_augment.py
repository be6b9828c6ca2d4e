"""Augmentation on the device: crops of what numpy cuts out, each image with its own draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.ops import augment

BATCH, HEIGHT, WIDTH, PAD = 192, 5, 6, 2
augmented = functools.partial(jax.jit, static_argnums=(2, 3))(augment.pad_crop_flip)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(1, 256, (BATCH, HEIGHT, WIDTH, 3)).astype(np.uint8)


def _crops(image):
    """{(row, col): crop} of the padded image, by slicing."""
    padded = np.pad(image, ((PAD, PAD), (PAD, PAD), (0, 0)))
    return {(i, j): padded[i:i + HEIGHT, j:j + WIDTH] for i in range(2 * PAD + 1) for j in range(2 * PAD + 1)}


def _found(image, result):
    """Where `result` was cut out of `image`, and whether it was mirrored: exactly one answer."""
    answers = [(*corner, mirrored) for corner, crop in _crops(image).items()
               for mirrored in (False, True) if np.array_equal(crop[:, ::-1] if mirrored else crop, result)]
    assert len(answers) == 1
    return answers[0]


def test_every_image_is_a_crop_that_numpy_cuts_and_perhaps_mirrored(images):
    results = np.asarray(augmented(jax.random.key(0), images, PAD, True))
    assert results.dtype == np.uint8 and results.shape == images.shape
    draws = np.array([_found(*pair) for pair in zip(images, results)])
    for axis in (0, 1):  # rows and columns: every offset occurs, none dominates
        assert np.bincount(draws[:, axis], minlength=5).min() > BATCH / 5 / 2
    assert abs(draws[:, 2].mean() - 0.5) < 0.12
    assert len({tuple(d) for d in draws}) > 35, "rows, columns and mirroring are drawn apart"


def test_same_key_same_result(images):
    once, again, other = (np.asarray(augmented(jax.random.key(seed), images, PAD, True)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, again)
    assert np.mean(np.any(once != other, axis=(1, 2, 3))) > 0.9


def test_draws_do_not_depend_on_the_images(images):
    draws = [[_found(*pair) for pair in zip(batch, np.asarray(augmented(jax.random.key(3), batch, PAD, True)))]
             for batch in (images, images[::-1])]
    assert draws[0] == draws[1]


def test_flip_alone_and_crop_alone(images):
    flipped = np.asarray(augmented(jax.random.key(4), images, 0, True))
    same = np.all(flipped == images, axis=(1, 2, 3))
    mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
    assert np.all(same ^ mirrored) and 0.38 < same.mean() < 0.62
    cropped = np.asarray(augmented(jax.random.key(4), images, PAD, False))
    assert not any(_found(*pair)[2] for pair in zip(images, cropped))
    np.testing.assert_array_equal(augmented(jax.random.key(4), images, 0, False), images)


def test_to_float():
    x = augment.to_float(jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1))
    assert x.dtype == jnp.float32 and x.min() == 0 and x.max() == 1
    np.testing.assert_allclose(x.ravel(), np.arange(256) / 255, rtol=1e-6)


def test_jitter_changes_colours_within_bounds():
    """Each image by factors of its own; grey stays grey, and without strength nothing changes."""
    x = jax.random.uniform(jax.random.key(0), (BATCH, 4, 4, 3), minval=0.3, maxval=0.6)
    found = np.asarray(jax.jit(augment.jitter)(jax.random.key(1), x, 0.25))
    brightness = found.mean((1, 2, 3)) / np.asarray(x).mean((1, 2, 3))
    assert 0.74 < brightness.min() < 0.8 and 1.2 < brightness.max() < 1.26 and found.min() >= 0 and found.max() <= 1
    spread = found.std((1, 2)).mean(-1) / np.asarray(x).std((1, 2)).mean(-1) / brightness
    assert spread.min() < 0.8 and spread.max() > 1.2, "contrast"
    np.testing.assert_allclose(augment.jitter(jax.random.key(1), x, 0.0), x, atol=1e-6)
    grey = augment.jitter(jax.random.key(2), jnp.broadcast_to(x[..., :1], x.shape), 0.25)
    np.testing.assert_allclose(grey[..., 0], grey[..., 2], atol=1e-6)
    assert augment.jitter(jax.random.key(2), x[..., :1], 0.25).shape == (BATCH, 4, 4, 1)


def test_turns_are_each_image_s_own():
    x = np.zeros((64, 9, 9, 1), np.float32)
    x[:, 4, 8] = 1
    rows = np.argmax(np.asarray(augment.turn(jax.random.key(0), x, 90.0)).reshape(64, -1), 1) // 9
    assert set(rows.tolist()) == set(range(9))
    np.testing.assert_array_equal(augment.turn(jax.random.key(0), x, 0.0), x)


def test_mixup_mixes_images_and_labels_alike():
    x = jnp.eye(8, dtype=jnp.float32).reshape(8, 8, 1, 1)
    mixed, target = augment.mixup(jax.random.key(0), x, jnp.eye(8, dtype=jnp.float32), 0.3)
    np.testing.assert_allclose(mixed.reshape(8, 8), target, atol=1e-6)
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-6)
    _, target = augment.mixup(jax.random.key(1), jnp.zeros((500, 1, 1, 1)), jnp.eye(500), 0.3)
    shares = np.asarray(target).max(1)
    assert shares.min() >= 0.5 - 1e-6 and np.mean(shares > 0.95) > 0.4, "Beta(0.3, 0.3) is mostly near 0 or 1"


def test_cutmix_pastes_rectangles_and_counts_pixels():
    """Every pixel is of the image or of one other, these form a rectangle, and labels have their shares."""
    count, height, width = 64, 6, 8
    number = np.arange(count, dtype=np.float32)
    x = np.broadcast_to(number[:, None, None, None], (count, height, width, 1))
    mixed, target = map(np.asarray, jax.jit(augment.cutmix, static_argnums=3)(
        jax.random.key(0), x, jnp.eye(count), 1.0))
    shares = []
    for i, (image, soft) in enumerate(zip(mixed[..., 0], target)):
        foreign = image != i
        rows, columns = np.flatnonzero(foreign.any(1)), np.flatnonzero(foreign.any(0))
        assert len(np.unique(image[foreign])) <= 1 and foreign.sum() == len(rows) * len(columns)
        expected = np.bincount(image.astype(int).ravel(), minlength=count) / image.size
        np.testing.assert_allclose(soft, expected, atol=1e-6)
        shares.append(soft[i])
    assert min(shares) < 0.3 and max(shares) > 0.95 and len({*np.round(shares, 5)}) > 15
    assert np.mean(shares) > 0.5, "borders cut rectangles, so that images keep more than half"
