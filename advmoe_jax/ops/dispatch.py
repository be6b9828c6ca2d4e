"""What a routed layer computes: every image, or token, through its expert, and through no other.

Inputs and outputs are in the order of the batch.

B batch, or all its tokens, H W height and width, I input channels, w channels of an expert, E experts, T images in a
block, s stride.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from advmoe_jax.core import mesh as meshes
from advmoe_jax.ops import blocks, grouped, plans, routing
from advmoe_jax.ops.conv import conv2d
from advmoe_jax.ops.plans import Plan

DISPATCHES = ("auto", "all", "blocks", "grouped", "host")
_ENGINES = {"blocks": blocks, "host": blocks, "grouped": grouped}
_HOST_SIZES = 8  # at most so many compiled sizes
_TOKENS = 128  # of a block
_OVERHEAD = {"pathways": 1.4, "wide": 1.9, "narrow": 2.0}  # of blocks on CPU: whole pathways, or layer by layer
_WIDE = 32


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How routed layers compute.

    Attributes:
        kind: "all": every expert, of which one is selected; "blocks": each image its own, block after block (CPU);
            "grouped": all blocks in one launch (TPU); "host": as "blocks", and where an image makes one choice for all
            layers, outside of traced programs the host sorts the images by expert (serving). Second derivatives are
            those of "all" alone.
        mesh: of all devices; each of them plans its own images. None: of one.
    """

    kind: str = "all"
    mesh: Mesh | None = None


def pick(kind: str, every: float, one_choice: bool, width: int, platform: str) -> str:
    """What "auto" stands for; any other kind stands for itself.

    Args:
        kind: one of DISPATCHES.
        every: how many times as much "all" computes as one expert: E, or C / w where that is less and channels shared.
        one_choice: whether an image makes one choice for all layers.
        width: channels of the dense network's first stage.
        platform: "cpu", "gpu" or "tpu". Accelerators get "all": nothing else was measured on one.
    """
    if kind != "auto":
        return kind
    overhead = _OVERHEAD["pathways" if one_choice else "wide" if width >= _WIDE else "narrow"]
    return "blocks" if platform == "cpu" and every > overhead else "all"


def block_size(batch: int, num_experts: int, are_tokens: bool = False) -> int:
    """T for a batch on one device: 8, 16 for large batches, 128 of tokens; less where experts have few."""
    size = _TOKENS if are_tokens else 8 if batch <= 64 else 16
    while size > 1 and size * num_experts > batch:
        size //= 2
    return size


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("gate", "plan", "expert", "shares"),
    meta_fields=("counterfactual", "dispatch"))
@dataclasses.dataclass(frozen=True)
class Choice:
    """What a routed layer is told of B images, or of all their tokens, one image after the other.

    Attributes:
        gate: (B, E) weights of the experts; one-hot in value if there is a plan or an expert.
        plan: of the images; None: all experts are computed and mixed.
        expert: () int32, the expert that all images take; None if each has its own.
        counterfactual: as Route.counterfactual; the other experts are computed in the backward pass, if anyone asks
            for that gradient.
        dispatch: how to compute, on the devices that share the plan.
        shares: (B, E) softmax of the scores, which `experts` weighs by.
    """

    gate: jax.Array
    plan: Plan | None = None
    expert: jax.Array | None = None
    counterfactual: bool = True
    dispatch: Dispatch = Dispatch()
    shares: jax.Array | None = None

    def of(self, rows: jax.Array, expert: jax.Array) -> "Choice":
        """That of some images (T,), all of which take one expert ()."""
        return Choice(self.gate[rows], expert=expert, shares=self.shares[rows])


def choose(scores: jax.Array, route: routing.Route, layer: int, dispatch: Dispatch) -> tuple[Choice, jax.Array]:
    """What a layer is told, and the experts that are taken, as `routing.gates` gives them. Arguments as there."""
    gate, ids = routing.gates(scores, route, layer)
    mesh, num_experts, rows = _of(dispatch.mesh, ids.shape[0]), scores.shape[-1], ids.reshape(-1)
    gate, shares = (weights.reshape(-1, num_experts) for weights in (gate, jax.nn.softmax(scores)))
    if dispatch.kind == "all" or route.kind == "soft":
        return Choice(gate, shares=shares), ids
    size = block_size(len(rows) // (mesh.size if mesh else 1), num_experts, scores.ndim > 2)
    plan = _per_device(functools.partial(plans.make, num_experts=num_experts, size=size), mesh)(rows)
    return Choice(gate, plan, None, route.counterfactual, Dispatch(dispatch.kind, mesh), shares), ids


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
        return y * jnp.take(choice.gate, choice.expert, axis=1).astype(y.dtype)[:, None, None, None]
    windows = [kernel[..., start:start + width] for start in starts]
    if len(starts) * width < kernel.shape[-1]:  # some stored channels belong to no expert
        kernel, starts = jnp.concatenate(windows, -1), tuple(range(0, len(starts) * width, width))
    if choice.plan is None:
        return routing.mix(conv2d(x, kernel, stride), choice.gate, starts, width)
    return _routed(x, jnp.stack(windows), jax.lax.stop_gradient(kernel), choice.gate, choice.plan, starts, stride,
                   choice.counterfactual, choice.dispatch)


def experts(expert: Callable[[Choice], jax.Array], choice: Choice) -> jax.Array:
    """What whole experts of several layers give, each weighted by its share in the softmax of the scores: of E experts
    y_e, sum_e gate_e shares_e y_e.

    An expert that is not taken is computed to its end on its own, as its straight-through gradient and soft mixtures
    need it; a gate at each of its layers would send what one expert computes into the next layer of another.

    Args:
        expert: computes one by layers that are given the choice which it is called with, (B, ..., C) or (B / T, T, C)
            of tokens.
        choice: who takes what.
    Returns:
        As `expert`.
    """
    weights = choice.gate * choice.shares

    def weighted(y, weight):
        return y * weight.reshape(len(y), -1, *(1,) * (y.ndim - 2)).astype(y.dtype)

    if choice.expert is not None or (choice.plan is not None and not choice.counterfactual):
        taken = dataclasses.replace(choice, gate=jax.lax.stop_gradient(choice.gate))
        return weighted(expert(taken), jnp.sum(weights, -1))
    ones = jnp.ones_like(choice.gate)
    return sum(weighted(expert(Choice(ones, expert=jnp.int32(e))), weights[:, e]) for e in range(ones.shape[-1]))


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
    def on_device(variables, x, choice):
        return blocks.pathways(lambda rows, expert: apply(variables, x[rows], choice.of(rows, expert)), choice.plan)

    return _per_device(on_device, choice.dispatch.mesh, replicated=(0,))(variables, x, choice)


def on_host(apply: Callable[[Any, jax.Array, Choice], jax.Array], variables: Any, x: jax.Array, choice: Choice,
            ids: np.ndarray) -> jax.Array:
    """As `pathways`, for arrays: each expert gets its images in one call, filled up to one of a few sizes.

    Args:
        apply: as of `pathways`, compiled.
        variables: of the network.
        x: (B, H, W, C).
        choice: the same for all layers.
        ids: (B,) the expert of each image.
    Returns:
        (B, K).
    """
    step, found = -(-len(ids) // _HOST_SIZES), {}
    for expert in np.unique(ids):
        rows = np.flatnonzero(ids == expert)
        take = np.resize(rows, -(-len(rows) // step) * step)
        found[expert] = rows, apply(variables, x[take], choice.of(take, jnp.int32(expert)))
    logits = {expert: np.asarray(y)[:len(rows)] for expert, (rows, y) in found.items()}  # when all of them run
    order = np.argsort(np.concatenate([rows for rows, _ in found.values()]))
    return jnp.asarray(np.concatenate(list(logits.values()))[order])


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _routed(x, kernels, stored, gate, plan, starts, stride, counterfactual, dispatch):
    function = functools.partial(_engine(dispatch).conv, stride=stride)
    return _per_device(function, dispatch.mesh, replicated=(0,))(kernels, x, plan)


def _engine(dispatch):
    return _ENGINES[dispatch.kind]


def _routed_fwd(x, kernels, stored, gate, plan, starts, stride, counterfactual, dispatch):
    y = _routed(x, kernels, stored, gate, plan, starts, stride, counterfactual, dispatch)
    return y, (x, kernels, stored, gate, plan, y)


def _routed_bwd(starts, stride, counterfactual, dispatch, saved, dy):
    x, kernels, stored, gate, plan, y = saved
    engine = _engine(dispatch)

    def by(function, *arguments, **how):
        return _per_device(functools.partial(function, stride=stride), dispatch.mesh, **how)(*arguments)

    dx = by(engine.input_grad, kernels, x, dy, plan, replicated=(0,))
    dkernels = by(engine.kernel_grad, kernels, x, dy, plan, replicated=(0,), summed=True)
    dgate = gate * jnp.sum(dy * y, (1, 2, 3))[:, None]
    if counterfactual:
        dgate += by(functools.partial(engine.gate_grad, starts), kernels, stored, x, dy, plan, replicated=(0, 1))
    return dx, dkernels, None, dgate.astype(gate.dtype), None


_routed.defvjp(_routed_fwd, _routed_bwd)
