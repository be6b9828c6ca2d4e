"""ONNX files compute what their models do; without jax2onnx one line says where it is to be had."""

import importlib.util

import jax
import numpy as np
import pytest
from exporting import CLASSES, KINDS, SHAPE, config_of, images, random_variables, run_of

from advmoe_jax import main
from advmoe_jax.interop.exports import onnx as onnx_format
from advmoe_jax.models import model as models

pytestmark = pytest.mark.usefixtures("tiny_resnet")
HAS_IT = importlib.util.find_spec("jax2onnx") is not None and importlib.util.find_spec("onnxruntime") is not None


def _export(workdir, form, *words):
    return main.main(["--mode", "export", "--workdir", str(workdir), f"--config.export.format={form}", *words])


@pytest.mark.skipif(HAS_IT, reason="jax2onnx is installed")
def test_without_jax2onnx(tmp_path, capsys):
    run_of(tmp_path / "run", "dense")
    assert _export(tmp_path / "run", "onnx") == 2
    assert ("needs jax2onnx, in an environment of its own: run `pip install 'advmoe_jax[onnx]'`"
            in capsys.readouterr().err)
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.oracle
@pytest.mark.skipif(not HAS_IT, reason="needs jax2onnx and onnxruntime: pip install 'advmoe_jax[onnx]', in an "
                                       "environment of its own")
@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_agrees(kind, tmp_path):
    """From a run's weights in a safetensors export, as where no orbax has written them; any number of images."""
    import onnxruntime

    run_of(tmp_path / "run", kind)
    given = "uint8" if kind == "dense" else "float"
    assert _export(tmp_path / "run", "safetensors") == 0
    assert _export(tmp_path / "run" / "export" / "safetensors", "onnx", f"--config.export.input={given}",
                   f"--config.export.out={tmp_path / 'out'}") == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / onnx_format.FILE))
    model = models.make(config_of(kind).model, SHAPE, CLASSES)
    variables, x = random_variables(model), images(5)
    pixels = np.asarray(255 * x, np.uint8)
    ours = np.asarray(jax.jit(model.outputs_fn(variables))(pixels / np.float32(255) if given == "uint8" else x)[0])
    for count in (1, 5):
        [theirs] = session.run(["logits"], {"images": (pixels if given == "uint8" else x)[:count]})
        np.testing.assert_allclose(theirs, ours[:count], rtol=1e-5, atol=1e-5)
    assert np.abs(ours).max() > .1
