"""High and low parts of images against waves whose frequencies are known, and a transform written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advmoe_jax.attacks import frequency, parse
from advmoe_jax.core.errors import UserError

SIZE = 16


def _run(x, **settings):
    attack = parse.attack("frequency", **{"mean": 0.5} | settings)
    return np.asarray(attack.run(None, jax.random.key(0), jnp.asarray(x, jnp.float32), jnp.zeros(len(x), int)))


def _wave(rows, columns, amplitude=0.2):
    """(1, 16, 16, 1) around 0."""
    i, j = np.mgrid[:SIZE, :SIZE]
    return (amplitude * np.cos(2 * np.pi * (rows * i + columns * j) / SIZE))[None, ..., None]


@pytest.mark.parametrize("rows, columns", [(2, 0), (0, 3), (3, 4), (-3, 4), (5, 5), (8, 0)])
def test_a_wave_is_low_below_theta_and_high_from_there_on(rows, columns):
    """In units of half the size, and as a circle: a wave of 3 rows and 4 columns has 5 of 8."""
    wave, radius = _wave(rows, columns), np.hypot(rows, columns) / (SIZE / 2)
    for theta in (radius - 0.01, min(radius, 1), radius + 0.01):
        if theta <= 1:
            low = theta > radius
            np.testing.assert_allclose(_run(0.4 + wave, part="low", theta=theta), 0.4 + low * wave, atol=1e-6)
            np.testing.assert_allclose(_run(0.4 + wave, part="high", theta=theta), 0.5 + (not low) * wave, atol=1e-6)


def test_theta_0_is_the_whole_image_to_the_bit():
    x = np.random.default_rng(0).uniform(size=(4, 7, 9, 3)).astype(np.float32)
    np.testing.assert_array_equal(_run(x, theta=0, mean="0.4 0.5 0.6"), x)
    np.testing.assert_allclose(_run(x, theta=0, mean="0.4 0.5 0.6", part="low"), np.broadcast_to(
        np.float32([0.4, 0.5, 0.6]), x.shape), atol=1e-6)


def test_it_is_the_papers_filter_of_normalised_images():
    """Whatever their deviations are; and the parts make up the image."""
    x = np.random.default_rng(0).uniform(0.3, 0.7, (3, SIZE, SIZE, 3))
    mean, std, theta = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.1]), 0.3
    far = np.hypot(*(np.mgrid[:SIZE, :SIZE] - SIZE / 2)) >= theta * SIZE / 2
    waves = np.fft.fftshift(np.fft.fft2((x - mean) / std, axes=(1, 2)), axes=(1, 2))
    high = np.fft.ifft2(np.fft.ifftshift(waves * far[None, ..., None], axes=(1, 2)), axes=(1, 2)).real
    found, low = (_run(x, theta=theta, mean="0.4 0.5 0.6", part=part) for part in ("high", "low"))
    np.testing.assert_allclose(found, (high * std + mean).clip(0, 1), atol=1e-5)
    inside = (found > 0) & (found < 1) & (low > 0) & (low < 1)
    np.testing.assert_allclose((found + low - mean)[inside], x[inside], atol=1e-5)
    assert inside.mean() > 0.95


@pytest.mark.parametrize("settings, says", [
    (dict(part="middle"), "part of frequency 'middle'"), (dict(theta=1.5), "theta of frequency is 1.5: expected 0 to"),
    (dict(mean="0.5 2 0.5"), "mean='0.5 2 0.5'"), (dict(mean=""), "mean=''"), (dict(mean="grey"), "mean is 'grey'")])
def test_bad_settings_are_one_line(settings, says):
    with pytest.raises(UserError) as failure:
        parse.attack("frequency", **settings)
    assert says in str(failure.value) and "\n" not in str(failure.value)


def test_other_channels_are_one_line():
    with pytest.raises(UserError, match="3 numbers in mean and images 1 channels"):
        _run(np.zeros((1, 4, 4, 1)), mean="0.4 0.5 0.6")


def test_labels():
    assert frequency.label(frequency.Config()) == "hfc-0.5"
    assert frequency.label(frequency.Config("low", 0.3)) == "lfc-0.3"
