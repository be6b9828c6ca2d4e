"""StableHLO: a program for each gradient that an honest evaluation attacks through, and the weights beside them.

`jax.export` writes it, with its promise that later versions read it. A program takes the weights by name and images,
in a batch of any size, and gives logits and what else the model says of each image; its gradients are kept, so that it
can be attacked. One file serves all the platforms that it was lowered for, which need not be at hand.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
from etils import epath

from advmoe_jax.core import files
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.core.fields import setting
from advmoe_jax.interop import export, exported
from advmoe_jax.interop.export import Export
from advmoe_jax.models.model import Model
from advmoe_jax.ops import augment
from advmoe_jax.train import weights

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _platforms(text: str, name: str = "export.platforms") -> tuple[str, ...]:
    return tuple(dict.fromkeys(one_of(f"platform in {name}", part.strip(), PLATFORMS) for part in text.split(",")))


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.export` for this format."""

    platforms: str = setting("cpu,cuda,tpu", "that one file serves, with commas: " + ", ".join(PLATFORMS),
                             read=_platforms)
    input: str = setting("float", "images: float32 in [0, 1]; or uint8, which have no gradients",
                         choices=export.INPUTS)


def write(of: Export, folder: epath.Path) -> str:
    """Writes model.stablehlo, a file for each other gradient, and the weights; gives the card's words."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("export.format=stablehlo needs flatbuffers: run `pip install 'advmoe_jax[export]'`")
    own, model = of.config.export, of.model.in_program()
    views = model.views if own.input == "float" else model.views[:1]
    for view in views:
        files.write_bytes(folder / exported.file_of(model, view), _program(model, view, own))
    export.write_run(of, folder)
    return _use(model, own, views)


def _program(model: Model, view: str, own) -> bytes:
    """A serialized program: ({name: weight}, images (b, H, W, C)) -> (logits (b, K), aux)."""
    def program(tensors, images):
        x = images if own.input == "float" else augment.to_float(images)
        return model.outputs_fn(weights.nested(tensors, model.shapes), view)(x)

    kind = jnp.float32 if own.input == "float" else jnp.uint8
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *model.image_shape), kind)
    with jax.default_matmul_precision("float32"):  # an accelerator's own default is coarser
        lowered = jax.export.export(jax.jit(program), platforms=_platforms(own.platforms))(
            weights.flat(model.shapes), images)
        return bytes(lowered.serialize(vjp_order=1 if own.input == "float" else 0))


def _use(model: Model, own, views: tuple[str, ...]) -> str:
    shape, platforms = ", ".join(map(str, model.image_shape)), ", ".join(_platforms(own.platforms))
    first, *others = (exported.file_of(model, view) for view in views)
    parts = [f"""```python
import jax
from jax import export
from safetensors.numpy import load_file

program = export.deserialize(bytearray(open("{first}", "rb").read()))
weights = load_file("{weights.FILE}")
logits, aux = jax.jit(program.call)(weights, images)  # (b, {shape}), {
        "float32 in [0, 1]" if own.input == "float" else "uint8"}
```

It needs jax, flatbuffers and safetensors, and runs on {platforms}; b is any number of images. It computes in float32,
every expert of a routed layer too; convolutions are in the form that is fastest on {jax.default_backend()}, where it
was exported."""]
    if others:
        parts.append(f"""The same function with other gradients, which an attack should go through too: {
            ", ".join(f"`{file}`" for file in others)}.""")
    if own.input == "float":
        parts.append("""Gradients go through it. In a folder with all files of this one,
`python -m advmoe_jax.main --mode evaluate --workdir FOLDER` attacks the programs themselves, and
`--config.init_from=FOLDER` starts a run from the weights.""")
    return "\n\n".join(parts) + "\n"
