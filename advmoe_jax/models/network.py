"""The whole network: a backbone and, when it has several experts, a router beside it.

Images are in [0, 1]. A network may normalise them itself, before the backbone and the router.
params and batch_stats are {"backbone": ..., "router": ...}. B batch, L routed choices, T tokens, E experts, K classes.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from advmoe_jax.core import find
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.core.tables import Table
from advmoe_jax.models import macs, normalisation, routing_facts
from advmoe_jax.models import router as routers
from advmoe_jax.models.layers import BLOCK
from advmoe_jax.ops import dispatch, routing, trace
from advmoe_jax.ops.dispatch import Choice, Dispatch

GROUPS = ("backbone", "router")
ROUTED = Only("model.num_experts of 2 or more", lambda config: config.model.get("num_experts", 1) > 1)
HAS_ROUTER = Only("one network with model.num_experts of 2 or more", lambda config: (
    ROUTED.holds(config) and "member" not in config.model))
"""That "router" is a parameter group of the model; those of an ensemble's members are parts of theirs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.model` that every backbone has."""

    num_experts: int = setting(2, "N, experts of a routed layer; 1 for a dense network", least=1, most=64)
    model_scale: float = setting(0.5, "r, the share of the dense network's channels that an expert has", above=0,
                                 most=1)
    width: int = setting(64, "channels of the first stage of the dense network", least=1, most=16384)
    experts: str = setting("shared", "channels of the experts: windows of the dense layer's, or each its own",
                           choices=("shared", "disjoint"), only=ROUTED)
    expert_init: str = setting("equal", "experts start as one, or independently", choices=("equal", "independent"),
                               only=ROUTED)
    router_grad: str = setting("ste_full", "gradient of the routers' own loss", choices=routing.ROUTER_GRADS[1:],
                               only=ROUTED)
    routing: str = setting("layer", "a router in every layer; one network on the image with a head for every layer; "
                                    "one choice for all layers", choices=routers.ROUTINGS, only=ROUTED)
    router_width: int = setting(16, "hidden width of the routers", least=1, most=65536, only=ROUTED)
    dispatch: str = setting("auto", "how experts are computed, see ops/dispatch.py", choices=dispatch.DISPATCHES,
                            only=ROUTED)
    mean: str = setting("", "what the model subtracts from images in [0, 1], a number for each channel; empty: it "
                            "takes them as they are", read=normalisation.means)
    std: str = setting("", "what it then divides them by, a number for each channel",
                       read=normalisation.deviations)


class _Module(nn.Module):
    backbone: nn.Module
    router: nn.Module | None
    dispatch: Dispatch
    dtype: Any = jnp.float32  # of what the backbone computes
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, x, route, train):
        x, image_scores = self._normalised(x), None
        if hasattr(self.router, "scores_image"):
            image_scores = self.router.scores_image(x, train)
        layers, choices = itertools.count(), {}

        def choose(features):
            """What the next routed layer takes. A global router has one choice, which all layers share."""
            layer = next(layers)
            if image_scores is None:
                features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
                features = jax.lax.stop_gradient(features) if route.detach else features
                scores = self.router.scores_layer(layer, features, train)
            else:
                layer = min(layer, image_scores.shape[1] - 1)
                scores = image_scores[:, layer]
            if layer not in choices:
                choices[layer] = scores, *dispatch.choose(scores, route, layer, self.dispatch)
            return choices[layer][1]

        logits = self._float(self.backbone(self._lowered(x), choose, train))
        if self.router is not None and not choices:
            raise UserError(f"{type(self.backbone).__name__} has several experts and no routed layer: expected one "
                            "that asks choose(x) before each RoutedConv")
        return logits, _aux(*zip(*((scores, ids) for scores, _, ids in choices.values()))) if choices else {}

    def scores(self, x):
        """(B, H, W, C) images -> (B, E), of a router with one choice for all layers."""
        return self.router.scores_image(self._normalised(x), 0)[:, 0]

    def pathway(self, x, choice):
        """Evaluation of images that all make the same choice in every layer."""
        return self._float(self.backbone(self._lowered(self._normalised(x)), lambda _: choice, 0))

    def _normalised(self, x):
        return normalisation.apply(x, self.mean, self.std)

    def _lowered(self, x):
        return x if self.dtype == jnp.float32 else x.astype(self.dtype)

    def _float(self, logits):
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _aux(scores, ids):
    scores = jnp.concatenate([of.reshape(of.shape[0], -1, of.shape[-1]) for of in scores], 1)
    best, second = jnp.moveaxis(jax.lax.top_k(scores, 2)[0], -1, 0)
    ids = jnp.concatenate([of.reshape(of.shape[0], -1) for of in ids], 1)
    return {"router_logits": scores, "expert_ids": ids, "margins": best - second}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as pure functions over its variables.

    Attributes:
        module: the linen module.
        backbone: name of the backbone's module in advmoe_jax.models.
        image_shape: (H, W, C).
        num_classes: K.
        num_experts: E, 1 for a dense network.
        one_choice: whether an image makes one choice for all layers.
        kind: "Dense", "S-Dense" or "MoE".
        router_grad: gradient that a router sees in loss passes, as routing.hard takes it.
        remat: whether what a block computes inside is computed again for its gradient, not kept.
        tokens: T, for each of which an image makes a choice in a routed layer; 1: it makes one choice.
    """

    module: nn.Module
    backbone: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_experts: int
    one_choice: bool = False
    kind: str = ""
    router_grad: str = "none"
    remat: bool = False
    tokens: int = 1

    @property
    def is_routed(self) -> bool:
        return self.num_experts > 1

    @property
    def about(self) -> str:
        return f"experts: model.dispatch={self.module.dispatch.kind}" if self.is_routed else ""

    @functools.cached_property
    def _traced(self) -> tuple[tuple[LayerSpec, ...], dict[str, Any]]:
        return trace.with_variables(self.module.clone(dispatch=Dispatch("all")), _image(self.image_shape),
                                    routing.hard(), 0)

    @property
    def shapes(self) -> dict[str, Any]:
        """Of the variables that `init` makes."""
        return {"batch_stats": {}} | self._traced[1]

    @functools.cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer: those of the backbone, of which the routed ones ask for choices in this order, then those of the
        router."""
        return tuple(sorted(self._traced[0], key=lambda spec: not spec.path.startswith("backbone/")))

    @property
    def groups(self) -> tuple[str, ...]:
        return GROUPS if self.is_routed else GROUPS[:1]

    @property
    def optim(self) -> Mapping[str, str]:
        return {group: group for group in self.groups}

    @property
    def views(self) -> tuple[str, ...]:
        return routing.VIEWS if self.is_routed else routing.VIEWS[:1]

    @property
    def surfaces(self) -> Mapping[str, Callable[[dict[str, Any]], jax.tree_util.Partial]]:
        return {"routed": self.routed_fn} if self.is_routed else {}

    def in_training(self, computing) -> "Network":
        """As Model.in_training."""
        module = self.module.clone(dtype=jnp.dtype(computing.precision))
        return dataclasses.replace(self, module=module, remat=computing.remat)

    def in_program(self) -> "Network":
        """As Model.in_program: every expert is computed."""
        return dataclasses.replace(self, module=self.module.clone(dispatch=Dispatch("all")))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables {"params": ..., "batch_stats": ...}, each a tree per group."""
        x = jnp.zeros((1, *self.image_shape), jnp.float32)
        return {"batch_stats": {}} | self.module.init(key, x, routing.hard(), 1)

    def apply(self, variables: dict[str, Any], x: jax.Array,
              route: routing.Route = routing.hard()) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Evaluation: BatchNorm uses running statistics.

        Args:
            variables: params and batch_stats.
            x: (B, H, W, C) in [0, 1].
            route: how experts are chosen.
        Returns:
            logits (B, K) and aux: empty for a dense network, else router_logits (B, L, E), expert_ids (B, L) and
            margins (B, L) between the two best scores.
        """
        if not self._has_pathways(route):
            return self._kept_by_block(lambda *data: self.module.apply(*data, 0))(variables, x, route)
        if self.module.dispatch.kind == "host" and _is_here((variables, x, route)):
            scores, choice, ids = _choices(_Static(self), variables, x, route)
            pathway = jax.tree_util.Partial(_pathway, _Static(self))
            return dispatch.on_host(pathway, variables, x, choice, np.asarray(ids)), _aux([scores], [ids])
        scores = self.module.apply(variables, x, method="scores")
        choice, ids = dispatch.choose(scores, route, 0, self.module.dispatch)
        pathway = functools.partial(self.module.apply, method="pathway")
        return dispatch.pathways(pathway, variables, x, choice), _aux([scores], [ids])

    def _has_pathways(self, route):
        """Whether an image makes one choice for all layers, and only that one is computed."""
        return (self.num_experts > 1 and self.one_choice and self.module.dispatch.kind in ("blocks", "host")
                and route.kind != "soft" and not route.counterfactual)

    def apply_train(self, variables: dict[str, Any], x: jax.Array, route: routing.Route = routing.hard()
                    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """Training: BatchNorm uses the batch. As `apply`, with the updated batch_stats at the end.

        Several passes over as many images, not by a fixed route, are x (B, P, H, W, C), and what is returned begins
        with (B, P). Each is normalised by its own statistics, and running ones see the first pass first. They run at
        once where images are computed in blocks, which then have less padding, else one after the other, for better
        cache use.
        """
        if x.ndim == 4 or (self.num_experts > 1 and self.module.dispatch.kind != "all"):
            return self._train_at_once(variables, x, route)
        found, batch_stats = [], variables["batch_stats"]
        for images in jnp.moveaxis(x, 1, 0):
            *outputs, batch_stats = self._train_at_once(
                {"params": variables["params"], "batch_stats": batch_stats}, images, route)
            found.append(outputs)
        logits, aux = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *found)
        return logits, aux, batch_stats

    def _train_at_once(self, variables, x, route):
        begin = x.shape[:-3]
        outputs, updated = self._kept_by_block(lambda *data: self.module.apply(
            *data, math.prod(begin[1:]), mutable=["batch_stats"]))(variables, x.reshape(-1, *x.shape[-3:]), route)
        logits, aux = jax.tree.map(lambda leaf: leaf.reshape(*begin, *leaf.shape[1:]), outputs)
        return logits, aux, updated.get("batch_stats", {})

    def _kept_by_block(self, function):
        policy = jax.checkpoint_policies.save_only_these_names(BLOCK)
        return jax.checkpoint(function, policy=policy) if self.remat else function

    def train_pass(self, variables: dict[str, Any], x: jax.Array
                   ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """As Model.train_pass. A straight-through gradient ends at the router's features, see `routing.hard`."""
        return self.apply_train(variables, x, routing.hard(self.router_grad, detach=self.router_grad != "none"))

    def outputs_fn(self, variables: dict[str, Any], view: str = routing.VIEWS[0]) -> jax.tree_util.Partial:
        """As Model.outputs_fn; a view is a gradient of hard routing."""
        return jax.tree_util.Partial(_evaluate, _Static(self), variables, route=routing.hard(view))

    def routed_fn(self, variables: dict[str, Any]) -> jax.tree_util.Partial:
        """`(x, route) -> (logits, aux)` with the weights as arguments of the traced program."""
        return jax.tree_util.Partial(_evaluate, _Static(self), variables)

    def gather(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As Model.gather, of one run."""
        if len(parts) != 1:
            raise UserError(f"init_from names {len(parts)} runs: expected one, for a network")
        return dict(parts[0])

    def metrics(self, passes: Mapping[str, Any]) -> dict[str, jax.Array]:
        return routing_facts.metrics(passes, self.num_experts, self.tokens) if self.is_routed else {}

    def progress(self, means: Mapping[str, Any]) -> str:
        return routing_facts.progress(means) if self.is_routed else ""

    def watch(self, means: Mapping[str, Any], batch_size: int, iterations: int) -> tuple[str, ...]:
        return routing_facts.watch(means, batch_size, iterations) if self.is_routed else ()

    def observe(self, aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"experts": aux["expert_ids"]} if self.is_routed else {}

    def facts(self, y: np.ndarray, clean: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray],
              among: np.ndarray) -> dict[str, Any]:
        if not self.is_routed:
            return {}
        return routing_facts.facts(clean["experts"], attacked["experts"], among, self.num_experts, self.tokens)

    def fact_tables(self, facts: Mapping[str, Any]) -> list[Table]:
        return [routing_facts.fact_table(facts)] if self.is_routed else []

    def costs(self, masks: Any = None, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
        return macs.count(self, masks)

    def layer_costs(self, masks: Any = None) -> tuple[macs.LayerCost, ...]:
        return macs.by_layer(self, masks)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A network as a part of a tree that holds no arrays."""

    network: Network


def _evaluate(static, variables, x, route):
    return static.network.apply(variables, x, route)


def _is_here(tree):
    """Whether all arrays of a pytree are known, and on one device."""
    return not trees.is_traced(tree) and all(
        len(leaf.devices()) == 1 for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))


@jax.jit
def _choices(static, variables, x, route):
    scores = static.network.module.apply(variables, x, method="scores")
    return scores, *dispatch.choose(scores, route, 0, Dispatch("all"))


@jax.jit
def _pathway(static, variables, x, choice):
    return static.network.module.apply(variables, x, choice, method="pathway")


def make(cfg, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh | None = None, name: str = ""
         ) -> Network:
    """Builds the network that `config.model` describes.

    A backbone whose routed layers ask `choose` with tokens (B, T, C), for each of which a router of the layer then
    chooses, has a method `tokens(image_shape) -> T`.

    Args:
        cfg: name of the backbone's module, its fields and those of `Config`.
        image_shape: (H, W, C).
        num_classes: K.
        mesh: of the devices that share a batch.
        name: of the backbone's module, `cfg.name` unless given.
    Raises:
        UserError: a field is out of range or names nothing.
    """
    module = find.module("models", name or cfg.name, defines="backbone", kind="model.name")
    mean, std = normalisation.read(cfg.mean, cfg.std, image_shape[-1])
    net = module.backbone(cfg, num_classes)
    tokens = net.tokens(image_shape) if hasattr(net, "tokens") else 1
    router = None
    if cfg.num_experts > 1:
        router = routers.make(cfg, lambda: _num_choices(net, image_shape, cfg.num_experts))
    every = cfg.num_experts if cfg.experts == "disjoint" else min(cfg.num_experts, 1 / cfg.model_scale)
    one_choice = cfg.routing == "global"
    kind = dispatch.pick(cfg.dispatch, every, one_choice, cfg.width, jax.default_backend())
    label = "MoE" if cfg.num_experts > 1 else "Dense" if cfg.model_scale == 1 else "S-Dense"
    return Network(_Module(net, router, Dispatch(kind, mesh), mean=mean, std=std), name or cfg.name,
                   tuple(image_shape), num_classes, cfg.num_experts, one_choice, label,
                   cfg.router_grad if cfg.num_experts > 1 else "none",
                   tokens=tokens if cfg.routing == "layer" else 1)


def _num_choices(net: nn.Module, image_shape: tuple[int, int, int], num_experts: int) -> int:
    """How many choices a backbone asks for."""
    asked = itertools.count()

    def choose(x):
        next(asked)
        even = jnp.ones((len(x), num_experts), x.dtype)
        return Choice(even, shares=even)

    jax.eval_shape(lambda x: net.init(jax.random.key(0), x, choose, 0), _image(image_shape))
    return next(asked)


def _image(shape):
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)
