"""The layers of linen modules, found by one abstract evaluation.

Inputs and outputs of every layer and norm are tagged, and the tags are found again in the traced program. The values
between them are followed from output to input: those are the paths of the data. Nothing is computed.

A layer is a module with a parameter "kernel" of its own. A norm is one with running statistics, or with a "scale" and
no kernel. Arrays are (B, ..., C).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Var

from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.ops.dispatch import Choice

_IMAGE = "the image"  # no path of a module has a space
_INPUT, _LAYER, _NORM = (f"{__name__} {what} " for what in ("input", "layer", "norm"))


@dataclasses.dataclass(frozen=True)
class _Sources:
    """The layers that a value comes from.

    Attributes:
        paths: of the layers, _IMAGE among them.
        join: as in LayerSpec.
        is_output: whether the value is the output of a layer as it is.
        is_data: whether the value depends on the image, if by no path, as the weights of attention do.
    """

    paths: tuple[str, ...] = ()
    join: str = ""
    is_output: bool = False
    is_data: bool = False


def layers(module: nn.Module, x: Any, *args) -> tuple[LayerSpec, ...]:
    """As `layers_of`, of a module that has no variables yet.

    Args:
        module: any linen module.
        x: (B, H, W, C), its first argument; shape and type suffice.
        *args: its other arguments, which are taken for settings and not for data.
    """
    return with_variables(module, x, *args)[0]


def with_variables(module: nn.Module, x: Any, *args) -> tuple[tuple[LayerSpec, ...], dict[str, Any]]:
    """`layers`, and the shapes of the variables that the module then has. Arguments as `layers`."""
    specs, (_, variables) = _traced(lambda x: module.init_with_output(jax.random.key(0), x, *args), x)
    return specs, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)


def layers_of(function: Callable[[jax.Array], Any], x: Any) -> tuple[LayerSpec, ...]:
    """Every convolution and linear layer that a function calls, in the order of the calls.

    A layer that is called several times is described by its first call, but for its inputs: they are those of all
    calls, joined by "add".

    Args:
        function: applies or initialises linen modules.
        x: (B, H, W, C), its argument; shape and type suffice.
    """
    return _traced(function, x)[0]


def _traced(function: Callable[[jax.Array], Any], x: Any) -> tuple[tuple[LayerSpec, ...], Any]:
    """As `layers_of`, with the shapes of what the function returns."""
    specs: dict[str, LayerSpec] = {}

    def tagged(call, args, kwargs, context):
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        module, path = context.module, "/".join(context.module.path)
        args = [_tag(arg, _INPUT + path) for arg in args]
        kwargs = {name: _tag(arg, _INPUT + path) for name, arg in kwargs.items()}
        y = call(*args, **kwargs)
        if not isinstance(y, jax.Array):
            return y
        if module.has_variable("params", "kernel"):
            is_routed = any(isinstance(arg, Choice) for arg in (*args, *kwargs.values()))
            specs.setdefault(path, _describe(module, path, y, is_routed))
            return _tag(y, _LAYER + path)
        return _tag(y, _NORM + path) if is_norm(module) else y

    def outputs(x):
        with nn.intercept_methods(tagged), jax.disable_jit():  # what jit has traced before would not be intercepted
            return function(x)

    inputs: dict[str, _Sources] = {}
    norms: dict[str, str] = {}
    products: dict[str, int] = {}
    program, returned = jax.make_jaxpr(outputs, return_shape=True)(x)
    _follow(program.jaxpr, [_Sources((_IMAGE,), is_data=True)], inputs, norms, products)
    found = tuple(dataclasses.replace(
        spec, norm=norms.get(path), inputs=tuple(source for source in inputs[path].paths if source != _IMAGE),
        join=inputs[path].join, products=products.get(path, 0) // x.shape[0]) for path, spec in specs.items())
    return found, returned


def is_norm(module: nn.Module) -> bool:
    """Whether a bound module is a norm."""
    return not module.has_variable("params", "kernel") and (
        module.has_variable("params", "scale") or module.has_variable("batch_stats", "mean"))


def _tag(value: Any, name: str) -> Any:
    return checkpoint_name(value, name) if isinstance(value, jax.Array) else value


def _describe(module: nn.Module, path: str, y: jax.Array, is_routed: bool) -> LayerSpec:
    """What a layer and its output show by themselves."""
    features = getattr(module, "features", 1)
    positions = y.shape[1:y.ndim - (1 if isinstance(features, int) else len(features))]
    stride = int(np.max(getattr(module, "strides", None) or getattr(module, "stride", 1)))
    return LayerSpec(path, module.get_variable("params", "kernel").shape, y.shape[-1], stride,
                     (*positions, *(1, 1)[len(positions):]), None, (), routed=is_routed,
                     groups=getattr(module, "feature_group_count", 1),
                     is_gathered=getattr(module, "is_gathered", False))


def _follow(program, given: list[_Sources], inputs: dict[str, _Sources], norms: dict[str, str],
            products: dict[str, int]) -> list[_Sources]:
    """The sources of what a program returns, by those of what it is given.

    Args:
        program: a jaxpr.
        given: of its last arguments; the others come from no layer.
        inputs: what each layer and norm reads, {path: sources}; is filled.
        norms: {path of a layer: that of its norm}; is filled.
        products: {path of a layer: as in LayerSpec}; is filled.
    """
    known: dict[Var, _Sources] = dict(zip(reversed(program.invars), reversed(given)))

    def of(values):
        return [known.get(value, _Sources()) if isinstance(value, Var) else _Sources() for value in values]

    for equation in program.eqns:
        sources, inner = of(equation.invars), _inner_programs(equation)
        name = equation.params["name"] if equation.primitive.name == "name" else ""
        if inner:
            branches = [_follow(part, sources, inputs, norms, products) for part in inner]
            results = [_unite(list(ways)) for ways in zip(*branches)]
        elif name.startswith(_LAYER):
            results = [_Sources((name.removeprefix(_LAYER),), is_output=True)]
        elif name.startswith(_NORM):
            path = name.removeprefix(_NORM)
            results = [dataclasses.replace(inputs[path], is_output=False)]
            if inputs[path].is_output:
                norms.setdefault(inputs[path].paths[0], path)
        elif name:
            results = sources
            if name.startswith(_INPUT):
                path = name.removeprefix(_INPUT)
                inputs[path] = _unite([inputs.get(path, _Sources()), *sources])
        else:
            results = [_computed(equation, sources)] * len(equation.outvars) if equation.outvars else []
            paths = [path for source in sources for path in source.paths]
            if equation.primitive.name == "dot_general" and paths and all(source.is_data for source in sources):
                path = paths[0]
                products[path] = products.get(path, 0) + _macs(equation)
        is_data = any(source.is_data for source in sources)
        known.update((value, dataclasses.replace(result, is_data=is_data))
                     for value, result in zip(equation.outvars, results))
    return of(program.outvars)


def _macs(product) -> int:
    """Multiply-accumulates of a dot_general."""
    (contracted, _), _ = product.params["dimension_numbers"]
    return product.outvars[0].aval.size * math.prod(product.invars[0].aval.shape[axis] for axis in contracted)


def _inner_programs(equation) -> list:
    """The jaxprs that an equation runs, such as those of jit, custom gradients, scan and cond."""
    names = ("jaxpr", "call_jaxpr", "branches", "body_jaxpr")
    found = next((equation.params[name] for name in names if name in equation.params), ())
    return [getattr(part, "jaxpr", part) for part in (found if isinstance(found, tuple) else (found,))]


def _computed(equation, sources: list[_Sources]) -> _Sources:
    """The sources of what any other equation gives."""
    y, params, join = equation.outvars[0].aval, equation.params, "add"
    shapes = [value.aval.shape for value in equation.invars]
    if not jnp.issubdtype(y.dtype, jnp.inexact):  # a comparison or an index is no data
        return _Sources()
    match equation.primitive.name:
        case "concatenate" if params["dimension"] == y.ndim - 1:
            join = "concat"
        case "dot_general":  # a sum over channels, as of queries times keys, leaves none of them
            contracted = params["dimension_numbers"][0]
            sources = [s for s, shape, axes in zip(sources, shapes, contracted) if len(shape) - 1 not in axes]
        case "add" | "sub" | "mul" | "div" | "max" | "min":  # one number for all channels, as a gate, is none of them
            sources = [s for s, shape in zip(sources, shapes) if shape[-1:] == y.shape[-1:]]
        case "broadcast_in_dim" if y.ndim and y.shape[-1] > 1:
            kept = shapes[0][-1:] == y.shape[-1:] and params["broadcast_dimensions"][-1] == y.ndim - 1
            sources = sources if kept else []
    return dataclasses.replace(_unite(sources, join), is_output=False)


def _unite(parts: list[_Sources], join: str = "add") -> _Sources:
    """Sources of what several values are joined to; those that "add" joins with themselves stay what they are."""
    parts = [part for part in parts if part.paths]
    if not parts or len(parts) == 1 or (join == "add" and len({(part.paths, part.join) for part in parts}) == 1):
        return parts[0] if parts else _Sources()
    return _Sources(tuple(dict.fromkeys(path for part in parts for path in part.paths)), join)
