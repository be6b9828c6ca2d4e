"""A dense network whose convolutions inside blocks are grouped ones: what grouped-kernel pruning leaves, without zeros.

As SR-GKP (NeurIPS 2023) and TMI-GKP (ICLR 2022) reshape what they pruned: each group of filters gathers the input
channels that it keeps, and the outputs are put back into the order that the norm behind expects.

k kernel size, I input channels, O output channels, n groups of g = O / n filters, m channels that a group keeps.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from advmoe_jax.core import shares, tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.core.layer_spec import block_convs, dotted
from advmoe_jax.models import network
from advmoe_jax.models.layers import Choose, Conv, GatheredConv
from advmoe_jax.models.network import Network


def _is_rate(value: str, name: str) -> None:
    if not 0 < shares.share(value, name) < 1:
        raise UserError(f"{name} is {value!r}: expected more than 0 and less than 1, such as '7/16'")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.model` for a compact network, beside those of its base."""

    base: str = setting("cifar_resnet", "backbone whose convolutions are made compact", room=("models", "backbone"))
    groups: int = setting(8, "n, groups of filters in a compact convolution", least=1, most=4096)
    rate: str = setting("7/16", "share of the input channels that a group does not read", read=_is_rate)
    kernels: str = setting("3x3", "the convolutions in blocks that are compact", choices=("3x3", "all"))


def check(config) -> None:
    """Raises UserError for a routed network."""
    _check_dense(config.model.num_experts)


def _check_dense(num_experts: int) -> None:
    if num_experts != 1:
        raise UserError(f"model.num_experts is {num_experts}: expected 1 with model.name=compact, which is for dense "
                        "networks")


class Compact(nn.Module):
    """A backbone in which other convolutions take the place of some.

    Attributes:
        base: the backbone.
        convs: ((path below the backbone, m), ...) of the convolutions that are compact.
        groups: n.
        form: how they are computed, as ops.gathered.conv2d takes it.
    """

    base: nn.Module
    convs: tuple[tuple[str, int], ...]
    groups: int
    form: str | None = None

    def setup(self):
        nn.share_scope(self, self.base)  # parameters have the paths that they have in the base

    def __call__(self, x: jax.Array, choose: Choose, train: int) -> jax.Array:
        """As the base."""
        kept, above = dict(self.convs), len(self.path)

        def compacted(call, args, kwargs, context):
            layer, path = context.module, "/".join(context.module.path[above:])
            if not isinstance(layer, Conv) or context.method_name != "__call__" or path not in kept:
                return call(*args, **kwargs)
            return GatheredConv(layer.features, kept[path], self.groups, layer.size, layer.stride, layer.use_bias,
                                self.form, parent=layer.scope)(*args, **kwargs)

        with nn.intercept_methods(compacted):
            return self.base(x, choose, train)


def model(cfg, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh | None = None) -> Network:
    """Builds the network that `config.model` describes. Arguments as `models.model.make`.

    Raises:
        UserError: it is routed, has no such convolutions, or one does not divide into groups or by the rate.
    """
    _check_dense(cfg.num_experts)
    dense = network.make(cfg, image_shape, num_classes, mesh, name=cfg.base)
    left, convs = 1 - shares.share(cfg.rate, "model.rate"), []
    for spec in block_convs(dense.layers, cfg.kernels):
        channels, filters = spec.kernel[2:]
        if filters % cfg.groups:
            raise UserError(f"{spec.path}: model.groups is {cfg.groups}: expected a divisor of the layer's {filters} "
                            "filters")
        kept = shares.exact(channels, left, f"{spec.path}: the channels that model.rate {cfg.rate} keeps")
        convs.append((spec.path.removeprefix("backbone/"), kept))
    if not convs:
        raise UserError(f"model.base={cfg.base} has no {cfg.kernels} convolution inside a block: expected a network "
                        "that has some")
    module = dense.module.clone(backbone=Compact(dense.module.backbone, tuple(convs), cfg.groups))
    return dataclasses.replace(dense, module=module, kind=f"compact {dense.kind}")


def computed_by(net: Network, form: str | None) -> Network:
    """A compact network with its convolutions in one form; None: in the fastest of this platform."""
    return dataclasses.replace(net, module=net.module.clone(backbone=net.module.backbone.clone(form=form)))


def from_masked(net: Network, variables: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """The variables, as numpy, of a compact network that computes what a masked one does. Norms are unchanged.

    Args:
        net: the compact network.
        variables: of its base, {"params": ..., "batch_stats": ...}, with zeros where masks have them.
        plan: {path of a layer: {"order", "kept"}}, of each compact one, as `pruning.srgkp.masks` gives it and
            pruning.json holds it, where the path is `core.layer_spec.dotted`: the O filters by group, and of each group
            the m input channels that it keeps.
    Raises:
        UserError: a layer has no plan, or one of another shape or kernel, or weights where its plan has none.
    """
    params, stats = ({name: np.asarray(leaf) for name, leaf in tree.named_leaves(variables[part]).items()}
                     for part in ("params", "batch_stats"))
    for spec in net.layers:
        if spec.is_gathered:
            name = f"{spec.path}/kernel"
            found = plan.get(spec.path, plan.get(dotted(spec.path)))
            if found is None or "order" not in found:
                raise UserError(f"the plan has no order of the filters of {spec.path}: expected one of every compact "
                                "layer")
            order, kept = np.asarray(found["order"], np.int32), _rectangle(found["kept"], spec)
            params[name] = _compacted(params[name], order, kept, spec)
            stats[f"{spec.path}/inputs"] = kept.ravel()
            stats[f"{spec.path}/outputs"] = np.argsort(order).astype(np.int32)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: {"params": params, "batch_stats": stats}[path[0].key][tree.path_name(path[1:])], net.shapes)


def _rectangle(kept, spec):
    """(n, m) int32. Raises UserError unless each group keeps as many as the layer reads."""
    if [len(of_group) for of_group in kept] != [spec.kernel[2]] * spec.groups:
        raise UserError(f"{spec.path} keeps {sorted({len(of_group) for of_group in kept})} input channels in "
                        f"{len(kept)} groups: expected {spec.kernel[2]} in {spec.groups}")
    return np.asarray(kept, np.int32)


def _compacted(kernel, order, kept, spec):
    """(k, k, m, O) of (k, k, I, O). Raises UserError for a plan that is not of this kernel."""
    filters = spec.kernel[-1]
    if kernel.ndim != 4 or kernel.shape[-1] != filters or sorted(order) != list(range(filters)) or (
            kept.min() < 0 or kept.max() >= kernel.shape[2]):
        raise UserError(f"{spec.path} has a kernel {kernel.shape}, of which this is no plan: expected an order of its "
                        "filters, and input channels that it has")
    read = np.repeat(kept, filters // len(kept), 0).T  # (m, O) of filters by group
    found = kernel[:, :, read, order[None]]
    if np.count_nonzero(found) != np.count_nonzero(kernel):
        raise UserError(f"{spec.path} has weights that the plan removes: expected those of a network that is masked by "
                        "it")
    return found
