"""PyTorch checkpoints as variables of our networks, by the names of their layers.

Nothing here knows a model: `Network.layers` says what there is, and `interop.names` has the PyTorch names of a backbone
in the module that is called like it. The names are those of the released AdvMoE
code (OPTML-Group/Robust-MoE-CNN) and of the CIFAR and torchvision ResNets that it follows: kernels are (O, I, k, k)
and linear weights (O, I); a BatchNorm has weight, bias, running_mean, running_var and num_batches_tracked. The
released code registers its one router in the model and in every routed convolution, so that a checkpoint holds the
router's tensors many times, as "router.fc.weight", "layer1.0.conv1.router.fc.weight" and so on.

As a command it makes a finished run of a checkpoint file, see `interop.import_run`:
`python -m advmoe_jax.interop.torch_import --arch resnet20 --weights FILE.th --out WORKDIR`.

I input channels, O output channels, k kernel size.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import cli, find, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.models.network import Network

_ROUTER = "router."
_KERNEL_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
_KERNEL_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


def to_variables(network: Network, state_dict: Mapping[str, Any],
                 router_state_dict: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Puts the tensors of a state dict where `network` has them.

    Running variances are taken as they are. PyTorch updates its own with the unbiased variance and flax with the
    biased one, which matters only for comparing them after further training.

    Args:
        network: any whose layers all have PyTorch names. Routers other than model.routing=global have none.
        state_dict: {PyTorch name: array}, with equal copies of the router or none.
        router_state_dict: the router's own, with names such as "fc.weight", where `state_dict` has none.
    Returns:
        {"params": ..., "batch_stats": ...} as `network.init` makes them.
    Raises:
        UserError: a tensor is missing, unknown, of another shape or not finite, or copies of the router differ.
    """
    found = _one_router(state_dict, router_state_dict or {})
    abstract = network.shapes
    expected = tree.named_leaves(abstract)
    names = _torch_names(network, expected)
    unknown = sorted(found.keys() - names.values())
    for name in names.values():
        if name not in found:
            raise missing(name, found, unknown)
    if unknown:
        raise UserError(f"unknown tensor {unknown[0]} {np.shape(found[unknown[0]])} in the state dict: "
                        f"expected only tensors of this network{_nearest(unknown[0], names.values())}")
    leaves = [_as_leaf(names[path], found[names[path]], leaf, path.endswith("/kernel"))
              for path, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def to_state_dict(network: Network, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What `to_variables` reads: {PyTorch name: array}, a router in the model and in every routed convolution, where
    the released code has it.

    Args:
        network: any whose layers all have PyTorch names.
        variables: {"params": ..., "batch_stats": ...} of it.
    Raises:
        UserError: a layer has no name, or experts share channels, which they never do in PyTorch.
    """
    leaves = {path: np.asarray(leaf) for path, leaf in tree.named_leaves(variables).items()}
    names, of_layers = _torch_names(network, leaves), layer_names(network)
    routed = [spec for spec in network.layers if spec.routed]
    if shared := next((spec for spec in routed if spec.kernel[-1] != network.num_experts * spec.width), None):
        raise UserError(f"{shared.path} stores {shared.kernel[-1]} channels for {network.num_experts} experts of "
                        f"{shared.width}: expected model.experts=disjoint, as in the released AdvMoE code")
    state = {name: leaves[path].transpose(_KERNEL_TO_TORCH[leaves[path].ndim]) if path.endswith("/kernel")
             else leaves[path] for path, name in names.items()}
    router = {name: tensor for name, tensor in state.items() if name.startswith(_ROUTER)}
    return state | {f"{of_layers[spec.path]}.{name}": tensor for spec in routed for name, tensor in router.items()}


def norm_name(layer: str) -> str:
    """PyTorch name of the BatchNorm behind a layer: "bn1" of "conv1", "shortcut.1" of "shortcut.0"."""
    head, _, last = layer.rpartition(".")
    last = str(int(last) + 1) if last.isdigit() else re.sub(r"^conv", "bn", last)
    return f"{head}.{last}" if head else last


def layer_names(network: Network) -> dict[str, str]:
    """The PyTorch name of every layer that has one, {"backbone/layer1_0/conv1": "layer1.0.conv1"}; of the router's
    layers without the prefix "router."."""
    names = {}
    for group, module in (("backbone", network.backbone), ("router", "global_router")):
        layers = tuple(spec for spec in network.layers if spec.path.startswith(f"{group}/"))
        if layers and module in find.names("interop.names", "rules"):
            rules = find.module("interop.names", module, defines="rules").rules(layers)
            found = ((spec.path, re.fullmatch(f"{group}/(?:{pattern})", spec.path), name)
                     for spec in layers for pattern, name in rules.items())
            names |= {path: match.expand(name) for path, match, name in found if match}
    return names


def _torch_names(network: Network, paths: Iterable[str]) -> dict[str, str]:
    """The PyTorch name of every leaf, {"params/backbone/conv1/kernel": "conv1.weight"}."""
    names, of_layers = {}, layer_names(network)
    for spec in network.layers:
        if spec.path not in of_layers:
            continue
        prefix, name = _ROUTER if spec.path.startswith("router/") else "", of_layers[spec.path]
        layer, norm = prefix + name, prefix + norm_name(name)
        names |= {f"params/{spec.path}/kernel": f"{layer}.weight", f"params/{spec.path}/bias": f"{layer}.bias"}
        if spec.norm:
            names |= {f"params/{spec.norm}/scale": f"{norm}.weight", f"params/{spec.norm}/bias": f"{norm}.bias",
                      f"batch_stats/{spec.norm}/mean": f"{norm}.running_mean",
                      f"batch_stats/{spec.norm}/var": f"{norm}.running_var"}
    nameless = next((path for path in paths if path not in names), None)
    if nameless:
        raise UserError(f"{nameless} has no PyTorch name: expected a network whose layers all have one; "
                        "of the routers only that of model.routing=global has")
    return {path: names[path] for path in paths}


def _one_router(state_dict: Mapping[str, Any], router_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that carry weights, all copies of the router merged under the prefix "router."."""
    merged, origin = {}, {}
    given = {**state_dict, **{f"router_state_dict.{_ROUTER}{name}": v for name, v in router_state_dict.items()}}
    for name, value in given.items():
        if name.endswith("num_batches_tracked"):
            continue
        short = re.sub(r"^(.*\.)?router\.", _ROUTER, name)
        if short not in merged:
            merged[short], origin[short] = value, name
        elif not np.array_equal(merged[short], value, equal_nan=True):
            raise UserError(f"copies of the router differ: {origin[short]} is not {name}; "
                            "expected one router in all layers")
    return merged


def _as_leaf(name: str, value: Any, leaf: jax.ShapeDtypeStruct, is_kernel: bool) -> jax.Array:
    """A tensor in the layout and type of our leaf."""
    value = np.asarray(value)
    shape = tuple(leaf.shape[axis] for axis in _KERNEL_TO_TORCH[leaf.ndim]) if is_kernel else leaf.shape
    if value.shape != shape:
        raise UserError(f"tensor {name} of the state dict is {value.shape}: expected {shape}")
    if not np.can_cast(value.dtype, np.float64, "same_kind"):
        raise UserError(f"tensor {name} of the state dict is {value.dtype}: expected real numbers")
    with np.errstate(over="ignore"):
        value = value.astype(leaf.dtype)
    if not np.isfinite(value).all():
        raise UserError(f"tensor {name} of the state dict has {np.sum(~np.isfinite(value))} values that are not "
                        f"finite in {leaf.dtype}: expected weights of a model that works")
    return jnp.asarray(value.transpose(_KERNEL_FROM_TORCH[value.ndim]) if is_kernel else value)


def missing(name: str, found: Iterable[str], unknown: Iterable[str]) -> UserError:
    """That a tensor is not among those found; `unknown` are those of them that have no use."""
    if name.startswith(_ROUTER) and not any(other.startswith(_ROUTER) for other in found):
        return UserError(f"the state dict has no router: expected tensors such as {name}, or a router_state_dict")
    return UserError(f"the state dict has no tensor {name}, which this network needs{_nearest(name, unknown)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; the nearest name is {near[0]}" if near else ""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or 2 for bad input."""
    from advmoe_jax.interop import import_run  # which imports this

    return import_run.main(argv)


if __name__ == "__main__":
    cli.leave(main)
