"""The strip of images that an evaluation kept, and accuracies that count all images."""

import numpy as np
import pytest
from fabricated import entry, workdir

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError
from advmoe_jax.evaluation import results
from advmoe_jax.report import reports

NO_BUDGET = dict(norm="", eps="", eps_value=0.0)


def _entry(theta, accuracy):
    attempts = [{"attack": f"hfc-{theta}", "view": "no gradient", "accuracy": accuracy}]
    return entry(routed=False) | NO_BUDGET | {"attack": f"hfc-{theta}", "attempts": attempts, "settings": {
        "theta": str(theta)}}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_of_images_and_the_accuracy_on_all_of_them(tmp_path, channels):
    folder = workdir(tmp_path, [_entry(0.3, 0.62), _entry(0.7, 0.31), entry(routed=False)])
    for stored in results.read(folder)[:2]:
        files.write_npz(folder / "eval" / stored["id"] / results.PICTURES, {
            "index": np.arange(3), "label": np.array([0, 1, 2]), "prediction": np.array([0, 1, 0]),
            "image": np.full((3, 8, 8, channels), 0.4, np.float32)})
    reports.write([folder])
    text = (folder / "report.md").read_text()
    assert "![pictures.png](pictures.png)" in text
    assert (folder / "pictures.png").read_bytes().startswith(b"\x89PNG")
    assert "### hfc-0.3, 200 test images of digits" in text and text.count("accuracy %") == 2
    assert " 62.00" in text and " 31.00" in text and "also of those that are wrong when clean" in text


def test_damaged_pictures_are_one_line(tmp_path):
    folder = workdir(tmp_path, [_entry(0.3, 0.62)])
    files.write_bytes(folder / "eval" / results.read(folder)[0]["id"] / results.PICTURES, b"PK nothing")
    with pytest.raises(UserError, match=r"pictures\.npz is damaged .*expected arrays; delete it"):
        reports.write([folder])


def test_without_pictures(tmp_path):
    reports.write([workdir(tmp_path, [entry(routed=False)])])
    assert "pictures.png" not in (tmp_path / "report.md").read_text() and not (tmp_path / "pictures.png").exists()
