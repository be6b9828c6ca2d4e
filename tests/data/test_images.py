"""What is taken of encoded images: for evaluation, for training, and of files that are odd or damaged."""

import io

import numpy as np
import pytest

pytest.importorskip("PIL")
import pictures  # beside this file
from PIL import Image

from advmoe_jax.core import config as configs
from advmoe_jax.core.errors import UserError
from advmoe_jax.data import images, pipeline
from advmoe_jax.data.images import Config, Images

VIEW = Config(image_size=12, resize=16)


class Store(list):
    """Encoded images as a store."""

    def read(self, number):
        return self[number]

    def where(self, number):
        return f"image {number}"


def split(*files, view=VIEW, order=None):
    return Images(Store(files), np.arange(len(files), dtype=np.int32),
                  np.arange(len(files)) if order is None else np.array(order), view)


def close(found, expected, most=12):
    """Up to what JPEG loses."""
    return np.abs(found.astype(int) - expected).max() <= most


@pytest.mark.parametrize("width, height, size, left, top", [
    (20, 16, (20, 16), 4, 2), (40, 50, (16, 20), 2, 4), (33, 21, (25, 16), 6, 2), (8, 8, (16, 16), 2, 2)])
def test_evaluation_takes_the_centre(width, height, size, left, top):
    content = pictures.jpeg(0, width=width, height=height)
    whole = Image.open(io.BytesIO(content)).resize(size, Image.Resampling.BILINEAR)
    expected = np.asarray(whole.crop((left, top, left + 12, top + 12)))
    np.testing.assert_array_equal(split(content).take(np.array([0]))["image"][0], expected)


@pytest.mark.parametrize("mode, kind, options", [
    ("CMYK", "JPEG", {}), ("RGBA", "PNG", {}), ("P", "PNG", {}), ("P", "PNG", {"transparency": bytes(9)}),
    ("RGB", "WEBP", {}), ("RGB", "BMP", {})])
def test_other_colours_and_kinds_are_converted(mode, kind, options):
    colourful = Image.fromarray(pictures.pixels(0))
    content = pictures.encoded(colourful.convert(mode, palette=Image.Palette.ADAPTIVE), kind, **options)
    [image] = split(content).take(np.array([0]))["image"]
    expected = images.centre(colourful, VIEW)
    assert np.abs(image.astype(int) - expected).mean() < 6
    assert split(content).draw(0, np.random.default_rng(0)).shape == (12, 12, 3)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_has_three_equal_channels(mode):
    content = pictures.encoded(Image.fromarray(pictures.pixels(0)).convert(mode), "PNG")
    [image] = split(content).take(np.array([0]))["image"]
    assert (image == image[..., :1]).all() and image.std() > 0


def test_a_random_part_is_that_of_its_generator():
    content = pictures.jpeg(0, width=40, height=30)
    one = split(content, content, order=[1, 0])
    drawn = [one.draw(row, np.random.default_rng(seed)) for row, seed in ((0, 1), (1, 1), (0, 2))]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    left, top, width, height = images.box(40, 30, VIEW.scale, np.random.default_rng(1))
    expected = Image.open(io.BytesIO(content)).resize(
        (12, 12), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    np.testing.assert_array_equal(drawn[0], np.asarray(expected))


def test_a_part_of_a_large_image_is_decoded_small():
    content = pictures.jpeg(0, width=320, height=240)
    generator = np.random.default_rng(0)
    left, top, width, height = images.box(320, 240, 0.9, np.random.default_rng(0))
    with Image.open(io.BytesIO(content)) as image:
        found = images.part(image, Config(image_size=12, scale=0.9), generator)
        assert image.size == (40, 30)
    expected = Image.fromarray(pictures.pixels(0, 320, 240)[top:top + height, left:left + width]).resize((12, 12))
    assert close(found, np.asarray(expected))


@pytest.mark.parametrize("width, height, least", [(30, 20, 0.08), (20, 30, 0.5), (3, 40, 0.08), (40, 3, 0.9),
                                                  (1, 1, 0.08)])
def test_boxes(width, height, least):
    generator, areas = np.random.default_rng(0), []
    for _ in range(300):
        left, top, w, h = images.box(width, height, least, generator)
        assert 0 <= left <= width - w and 0 <= top <= height - h and w > 0 and h > 0
        areas.append(w * h / (width * height))
        if min(width, height) > 10 and w * h > 40:
            assert 0.6 < w / h < 1.6
    if min(width, height) > 10:
        assert min(areas) < least + 0.1 and min(areas) > least - 0.05 and max(areas) > 0.7
    if width == 3:  # no such part fits: the middle, as wide as the image
        assert (left, top, w, h) == (0, 18, 3, 4)


def test_the_centre_of_a_training_image():
    content = pictures.jpeg(0)
    padded = split(content, view=Config(image_size=12, resize=16, crop="pad"))
    np.testing.assert_array_equal(padded.draw(0, None), padded.take(np.array([0]))["image"][0])


@pytest.mark.parametrize("content", [b"", b"no image", pictures.jpeg(0)[:-200]])
def test_what_cannot_be_decoded_is_black_and_said(content, capsys):
    images._warn_once.cache_clear()
    damaged = split(pictures.jpeg(1), content)
    for _ in range(2):
        batch = damaged.take(np.array([1, 0]))
        assert not batch["image"][0].any() and batch["image"][1].any() and batch["label"].tolist() == [1, 0]
    assert capsys.readouterr().err == "warning: image 1 cannot be decoded and is shown black\n"
    assert damaged.draw(1, np.random.default_rng(0)) is None


def test_fields(tmp_path):
    pictures.tree(tmp_path / "set")
    config = configs.default(data="imagefolder")
    config.data.dir, config.data.image_size, config.data.resize = str(tmp_path / "set"), 10, 14
    data = pipeline.load(config.data, "validation", 100)
    assert data.image_shape == (10, 10, 3) and (len(data.train), len(data.test), data.num_classes) == (12, 6, 3)
    assert set(data.train.labels[:6]) == {0, 1, 2}, "the first images are of all classes"
    assert data.test.where(0).endswith(".JPEG") and str(tmp_path) in data.test.where(0)
    for text, words in (("data.resize=8", "data.resize is 8: expected data.image_size, 10"),
                        ("data.image_size=4", "data.image_size is 4: expected 8"),
                        ("data.crop=centre", "data.crop"), ("data.pad=2", "data.pad is 2, which has no effect")):
        wrong = config.copy_and_resolve_references()
        configs.override(wrong, text)
        with pytest.raises(UserError, match=words):
            configs.check(wrong)
    config.data.crop = "pad"
    configs.check(config)
    configs.override(config, "data.scale=0.5")
    with pytest.raises(UserError, match="data.scale is 0.5, which has no effect"):
        configs.check(config)


def test_crops_on_the_device():
    """A part that was drawn at random does not move once more."""
    for name, crop, expected in (("imagenet", "resized", 0), ("imagenet", "pad", 4), ("tiny_imagenet", "pad", 4)):
        config = configs.default(data=name)
        config.data.crop = crop
        assert pipeline.padding(config.data) == expected
    assert pipeline.padding(configs.default(data="cifar10").data) == 4
