"""The convolution of a routed layer: every image through the filters of its expert, and no others.

Inputs and outputs are in the order of the batch: a block gathers its images, computes while they are in cache, and the
outputs are put back, so that no filler is seen by a BatchNorm, a residual or a router.

B batch, H W height and width, I input channels, w channels of an expert, E experts, n blocks of T images, s stride.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from advmoe_jax.core import mesh as meshes
from advmoe_jax.ops import plans, routing
from advmoe_jax.ops.conv import conv2d
from advmoe_jax.ops.plans import Plan

DISPATCHES = ("all", "blocks")


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How routed layers compute.

    Attributes:
        kind: "all": every expert, of which one is selected; "blocks": each image its own.
        mesh: of all devices; each of them plans its own images. None: of one.
    """

    kind: str = "all"
    mesh: Mesh | None = None


def block_size(batch: int, num_experts: int) -> int:
    """T for a batch on one device: 8, 16 for large batches, less where experts have few images."""
    size = 8 if batch <= 64 else 16
    while size > 1 and size * num_experts > batch:
        size //= 2
    return size


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("gate", "plan", "expert"), meta_fields=("grad", "mesh"))
@dataclasses.dataclass(frozen=True)
class Choice:
    """What a routed layer is told.

    Attributes:
        gate: (B, E) weights of the experts; one-hot in value if there is a plan or an expert.
        plan: of the images; None: all experts are computed and mixed.
        expert: () int32, the expert that all images take; None if each has its own.
        grad: as Route.grad: with "ste_full" the scores of experts that were not chosen get a gradient too, for which
            they are computed in the backward pass, if anyone asks for it.
        mesh: as Dispatch.mesh.
    """

    gate: jax.Array
    plan: Plan | None = None
    expert: jax.Array | None = None
    grad: str = "ste_full"
    mesh: Mesh | None = None


def choose(scores: jax.Array, route: routing.Route, layer: int, dispatch: Dispatch) -> tuple[Choice, jax.Array]:
    """What a layer is told of its images, and the experts (B,) that they take. Arguments as `routing.gates`."""
    gate, ids = routing.gates(scores, route, layer)
    if dispatch.kind == "all" or route.kind == "soft":
        return Choice(gate), ids
    mesh = _of(dispatch.mesh, len(ids))
    size = block_size(len(ids) // (mesh.size if mesh else 1), gate.shape[-1])
    plan = _per_device(functools.partial(plans.make, num_experts=gate.shape[-1], size=size), mesh)(ids)
    return Choice(gate, plan, None, route.grad, mesh), ids


def conv(x: jax.Array, kernel: jax.Array, choice: Choice, starts: tuple[int, ...], width: int, stride: int
         ) -> jax.Array:
    """A routed convolution.

    Args:
        x: (B, H, W, I).
        kernel: (k, k, I, C) filters of all experts.
        choice: who takes what.
        starts: first channel of each expert.
        width: w.
        stride: s.
    Returns:
        (B, H / s, W / s, w).
    """
    if choice.expert is not None:
        start = jnp.asarray(starts)[choice.expert]
        y = conv2d(x, jax.lax.dynamic_slice_in_dim(kernel, start, width, 3), stride)
        return y * jnp.take(choice.gate, choice.expert, axis=1)[:, None, None, None]
    if choice.plan is None:
        return routing.mix(conv2d(x, kernel, stride), choice.gate, starts, width)
    kernels = jnp.stack([kernel[..., start:start + width] for start in starts])
    return _blocks(x, kernels, choice.gate, choice.plan, stride, choice.grad == "ste_full", choice.mesh)


def pathways(apply: Callable[[Any, jax.Array, Choice], jax.Array], variables: Any, x: jax.Array, choice: Choice
             ) -> jax.Array:
    """A network of which every image takes one pathway, block by block; rows must not depend on each other.

    Args:
        apply: (variables, (T, H, W, C) images, choice of a block) -> (T, K).
        variables: of the network.
        x: (B, H, W, C).
        choice: with a plan, the same for all layers.
    Returns:
        (B, K).
    """
    def on_device(variables, x, gate, plan):
        def block(rows, expert):
            return apply(variables, x[rows], Choice(gate[rows], expert=expert))

        return _map(block, plan)

    return _per_device(on_device, choice.mesh, replicated=(0,))(variables, x, choice.gate, choice.plan)


def _of(mesh, batch):
    return mesh if mesh is not None and mesh.size > 1 and batch % mesh.size == 0 else None


def _per_device(function, mesh, replicated=(), summed=False):
    """`function` on the rows of each device alone; `summed`, its result is added up over the devices."""
    if mesh is None:
        return function

    def mapped(*arguments):
        specs = tuple(PartitionSpec() if i in replicated else PartitionSpec(meshes.AXIS) for i in range(len(arguments)))
        inner = (lambda *a: jax.lax.psum(function(*a), meshes.AXIS)) if summed else function
        return jax.shard_map(inner, mesh=mesh, in_specs=specs, check_vma=False,
                             out_specs=PartitionSpec() if summed else PartitionSpec(meshes.AXIS))(*arguments)

    return mapped


def _rows(plan):
    """(n, T) rows of the batch that blocks read; a filler reads the last one."""
    return jnp.minimum(plan.image, plan.place.shape[0] - 1)


def _map(function, plan):
    """`function` of the rows and the expert of every block that is used; the results in the order of the batch."""
    arguments = _rows(plan), plan.expert
    shape = jax.eval_shape(function, *(a[0] for a in arguments))

    def block(inputs):
        used, arguments = inputs
        return jax.lax.cond(used, function, lambda *_: jnp.zeros(shape.shape, shape.dtype), *arguments)

    found = jax.lax.map(block, (plan.used, arguments))
    return found.reshape(-1, *found.shape[2:])[plan.place]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _blocks(x, kernels, gate, plan, stride, counterfactual, mesh):
    def on_device(kernels, x, plan):
        return _map(lambda rows, expert: conv2d(x[rows], kernels[expert], stride), plan)

    return _per_device(on_device, mesh, replicated=(0,))(kernels, x, plan)


def _blocks_fwd(x, kernels, gate, plan, stride, counterfactual, mesh):
    y = _blocks(x, kernels, gate, plan, stride, counterfactual, mesh)
    return y, (x, kernels, gate, plan, y)


def _blocks_bwd(stride, counterfactual, mesh, saved, dy):
    x, kernels, gate, plan, y = saved
    dx = _per_device(functools.partial(_input_grad, stride), mesh, replicated=(0,))(kernels, x, dy, plan)
    dkernels = _per_device(functools.partial(_kernel_grad, stride), mesh, replicated=(0,), summed=True)(
        kernels, x, dy, plan)
    if counterfactual:
        others = conv2d(x, jnp.concatenate(list(kernels), -1), stride)
        others = others.reshape(*dy.shape[:3], len(kernels), -1)
        dgate = jnp.einsum("bhwc,bhwec->be", dy, others)
    else:
        dgate = gate * jnp.sum(dy * y, (1, 2, 3))[:, None]
    return dx, dkernels, dgate.astype(gate.dtype), None


def _input_grad(stride, kernels, x, dy, plan):
    def block(rows, expert):
        pull = jax.vjp(lambda u: conv2d(u, kernels[expert], stride), x[rows])[1]
        return pull(dy[rows])[0]

    return _map(block, plan)


def _kernel_grad(stride, kernels, x, dy, plan):
    def block(total, inputs):
        rows, real, expert, used = inputs

        def add(total):
            pull = jax.vjp(lambda k: conv2d(x[rows], k, stride), kernels[expert])[1]
            return total.at[expert].add(pull(jnp.where(real[:, None, None, None], dy[rows], 0))[0])

        return jax.lax.cond(used, add, lambda total: total, total), None

    inputs = _rows(plan), plan.image < len(x), plan.expert, plan.used
    return jax.lax.scan(block, jnp.zeros_like(kernels), inputs)[0]


_blocks.defvjp(_blocks_fwd, _blocks_bwd)
