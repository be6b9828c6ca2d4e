"""ONNX, by jax2onnx: one file with the weights in it, images in a batch of any size -> logits, without gradients.

jax2onnx pins an older orbax, so that it has an environment of its own: `pip install 'advmoe_jax[onnx]'`. What was
exported as safetensors elsewhere is exported from there.
"""

import dataclasses

import jax
import jax.numpy as jnp
from etils import epath

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError, first_line
from advmoe_jax.core.fields import setting
from advmoe_jax.interop import export
from advmoe_jax.interop.export import Export
from advmoe_jax.ops import augment

FILE = "model.onnx"


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.export` for this format."""

    input: str = setting("float", "images: float32 in [0, 1]; or uint8", choices=export.INPUTS)


def write(of: Export, folder: epath.Path) -> str:
    """Writes model.onnx; gives the card's words."""
    try:
        import jax2onnx
    except ImportError:
        raise UserError("export.format=onnx needs jax2onnx, in an environment of its own: run `pip install "
                        "'advmoe_jax[onnx]'` there, and this command on the run or on its export.format=safetensors"
                        ) from None
    model, is_float = of.model.in_program(), of.config.export.input == "float"
    outputs_fn = model.outputs_fn(jax.tree.map(jnp.asarray, of.trained.variables))

    def logits(images):
        return outputs_fn(images if is_float else augment.to_float(images))[0]

    images = jax.ShapeDtypeStruct(("b", *model.image_shape), jnp.float32 if is_float else jnp.uint8)
    try:
        proto = jax2onnx.to_onnx(logits, [images], model_name=of.config.name, input_names=["images"],
                                 output_names=["logits"])
    except Exception as error:  # it raises whatever its handler of an operation raised
        raise UserError(f"jax2onnx cannot convert this {model.kind} model ({first_line(error)}): expected "
                        "export.format=stablehlo or safetensors") from error
    files.write_bytes(folder / FILE, proto.SerializeToString())
    return f"""```python
import onnxruntime

session = onnxruntime.InferenceSession("{FILE}")
[logits] = session.run(["logits"], {{"images": images}})  # (b, {", ".join(map(str, model.image_shape))}) {
        "float32 in [0, 1]" if is_float else "uint8"}
```
"""
