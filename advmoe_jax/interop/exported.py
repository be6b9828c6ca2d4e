"""A model as the programs of a StableHLO export compute it, so that an evaluation attacks what users get.

The config says what kind of model it is, its layers and its costs; logits, what else is said of an image, and gradients
come from the programs. Nothing in a file is run but arithmetic: a program that calls anything else is refused.

B batch, V vectors that are mapped over.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax import export

from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.models.model import Model, Variables
from advmoe_jax.train import weights

_FILE = "model.stablehlo"
_CALL = re.compile(r"custom_call\b(?! @shape_assertion\()[^\n]{0,60}")
"""A call of anything but the check of a shape, which is all that the programs of an export call."""


def file_of(model: Model, view: str) -> str:
    """The file of the program with the gradient of a view; that of the first has no name of its own."""
    return _FILE if view == model.views[0] else _FILE.replace(".", f".{view}.")


def of(model: Model, workdir: epath.Path) -> Model:
    """A model as the programs in a workdir compute it; the model itself where there are none.

    Raises:
        UserError: a program cannot be read, is of another model or platform, keeps no gradients, or calls something.
    """
    if not (workdir / _FILE).exists():
        return model
    return Exported(model, tuple(_read(workdir / file_of(model, view), model) for view in model.views))


@dataclasses.dataclass(frozen=True)
class Exported:
    """A `models.model.Model`: another one but for what the programs compute.

    Attributes:
        model: the other one.
        programs: one for each of its views.
    """

    model: Model
    programs: tuple["Program", ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def about(self) -> str:
        return f"computed by {_FILE}"

    @property
    def surfaces(self) -> Mapping[str, Callable[[Variables], jax.tree_util.Partial]]:
        """Those that are the model's outputs; routes cannot be chosen from outside."""
        return {name: self.outputs_fn for name, surface in self.model.surfaces.items()
                if surface == self.model.outputs_fn}

    def outputs_fn(self, variables: Variables, view: str = "none") -> jax.tree_util.Partial:
        """As Model.outputs_fn; weights get no gradient."""
        place = self.views.index(view) if view in self.views else 0
        return jax.tree_util.Partial(outputs, self.programs[place], weights.flat(variables))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program as a part of a tree that holds no arrays. Both functions may be mapped over by `jax.vmap`.

    Attributes:
        exported: ({name: weight}, images (B, H, W, C)) -> (logits (B, K), aux).
    """

    exported: export.Exported

    @functools.cached_property
    def forward(self) -> Callable:
        """(weights, x) -> outputs."""
        return _mapped(self.exported.call)

    @functools.cached_property
    def backward(self) -> Callable:
        """(weights, x, slopes of the outputs that are no integers) -> slope of x."""
        def pull(tensors, x, *slopes):
            return jax.vjp(lambda x: _smooth(self.exported.call(tensors, x)), x)[1](list(slopes))[0]

        return _mapped(pull)


def _smooth(outputs):
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def outputs(program: Program, tensors: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a program gives; its weights get no gradient."""
    return _called(program, jax.lax.stop_gradient(tensors), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _called(program, tensors, x):
    return program.forward(tensors, x)


def _called_bwd(program, saved, slopes):
    return None, program.backward(*saved, *_smooth(slopes))


_called.defvjp(lambda program, tensors, x: (_called(program, tensors, x), (tensors, x)), _called_bwd)


def _mapped(function: Callable) -> Callable:
    """A function (weights, arrays with leading B, ...) which under `jax.vmap` gets the V vectors as a batch of V * B:
    jax itself cannot map over a program."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, is_mapped, tensors, *arrays):
        if any(jax.tree.leaves(is_mapped[0])):
            raise NotImplementedError("a program of an export cannot be mapped over its weights")
        full = [array if own else jnp.broadcast_to(array[None], (size, *array.shape))
                for array, own in zip(arrays, is_mapped[1:])]
        found = mapped(tensors, *(array.reshape(-1, *array.shape[2:]) for array in full))
        return jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), found), jax.tree.map(
            lambda _: True, found)

    return mapped


def _read(path: epath.Path, model: Model) -> Program:
    try:
        program = export.deserialize(bytearray(path.read_bytes()))
        (tensors, images), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
        modules = [program.mlir_module()]
        if program.has_vjp():
            modules.append(program.vjp().mlir_module())
    except ImportError:
        raise UserError(f"{path} needs flatbuffers: run `pip install 'advmoe_jax[export]'`") from None
    except Exception as error:  # of flatbuffers, of MLIR, or of a program that takes something else
        raise UserError(f"{path} cannot be read ({type(error).__name__}): expected a program that --mode export wrote"
                        ) from None
    if call := next(filter(None, map(_CALL.search, modules)), None):
        raise UserError(f"{path} asks for a {call[0].strip()!r}, which no exported model needs and which could run "
                        "code; it was not run: expected a program that --mode export wrote")
    if len(modules) == 1:
        raise UserError(f"{path} takes {images.dtype} images and keeps no gradients: expected one that was exported "
                        "with export.input=float, to be attacked")
    if (platform := export.default_export_platform()) not in program.platforms:
        raise UserError(f"{path} is for {', '.join(program.platforms)}, and this is {platform}: expected one that was "
                        f"exported with it in export.platforms")
    expected = weights.flat(model.shapes) | {"images": jax.ShapeDtypeStruct(model.image_shape, images.dtype)}
    if different := tree.first_difference(expected, tensors | {"images": jax.ShapeDtypeStruct(
            images.shape[1:], images.dtype)}):
        name, ours, theirs = different
        raise UserError(f"{path} is of another model: it takes {name} of shape {theirs}, and the config's has {ours}")
    return Program(program)
