"""Experts behind a gate: the gate sees the image and weighs what the experts say of it.

MoL, Cheng et al., WACVW 2022; one expert for each kind of perturbation. The gate is a network of its own, with an
output for each expert, or, as in RT-ER (Zhang et al., ICML 2025), a linear layer. An expert is a parameter group, and
so is the gate: each is trained, frozen and saved whole.

M experts, B batch, P passes, K classes, k experts that an image takes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.core.tables import Table
from advmoe_jax.models import gate_facts, network
from advmoe_jax.models.macs import LayerCost
from advmoe_jax.models.members import costs_within, layers_within, of_group, stacked
from advmoe_jax.models.network import Network
from advmoe_jax.ops import dispatch, gating, routing
from advmoe_jax.ops.dispatch import Dispatch
from advmoe_jax.ops.gating import mix

GATE = "gate"
_NETWORK = Only("model.gate=trained", lambda config: config.model.get("gate") == "trained")
_GATED = Only("model.gate trained or linear", lambda config: config.model.get("gate") != "uniform")
_MOST = 64


def _served(text: str, name: str = "model.serve") -> int:
    """k of "top-k"; 0 of "all"."""
    found = re.fullmatch(r"top-([1-9]\d?)", text.strip())
    if not found and text.strip() != "all":
        raise UserError(f"{name} is {text!r}: expected all, or top-1, top-2 and so on")
    return int(found[1]) if found else 0


def _widths(text: str, name: str = "model.widths") -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdigit() and 0 < int(part) <= 16384 for part in parts):
        raise UserError(f"{name} is {text!r}: expected a width for each expert, with commas, such as '16, 16, 8'")
    return tuple(map(int, parts))


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.model` for a mixture, beside those of its experts, which its gate shares."""

    num_members: int = setting(4, "M, experts", least=2, most=_MOST)
    member: str = setting("resnet", "backbone of the experts and of the gate", room=("models", "backbone"))
    widths: str = setting("", "of the experts, with commas, where they differ; empty: model.width", read=_widths)
    gate: str = setting("trained", "a network of its own, a linear layer on the pixels, or the same weight for every "
                                   "expert", choices=("trained", "linear", "uniform"))
    gate_width: int = setting(0, "width of the gate; 0: model.width", least=0, most=16384, only=_NETWORK)
    combine: str = setting("logits", "what is averaged: the experts' logits; their probabilities, whose logarithm is "
                                     "given; or their probabilities, given as if they were logits, as released",
                           choices=gating.COMBINATIONS)
    divide_by_n: bool = setting(False, "divide the sum of the logits by M, as a part of the released code does")
    serve: str = setting("all", "experts that users get: all, or the top-1, top-2 ... of the gate, whose weights then "
                                "add up to 1 and of which the others are not computed", read=_served, only=_GATED)
    expert_norm: str = setting("evaluation", "statistics by which the experts normalise in loss passes: their own, or "
                                             "those of the batch, so that their own drift, as released",
                               choices=("evaluation", "training"))


def check(config) -> None:
    """Raises UserError for fields that do not fit together."""
    cfg = config.model
    _check(cfg)
    if cfg.get("num_experts", 1) != 1:
        raise UserError(f"model.num_experts is {cfg.num_experts}: expected 1 with model.name={cfg.name}, whose experts "
                        "are not routed inside; model.num_members is how many there are")


def _check(cfg) -> None:
    count, widths, served = cfg.num_members, _widths(cfg.widths), _served(cfg.serve)
    if widths and len(widths) != count:
        raise UserError(f"model.widths is {cfg.widths!r}: expected {count} (model.num_members), one for each expert")
    if served > count:
        raise UserError(f"model.serve is {cfg.serve!r}: expected at most top-{count} (model.num_members)")
    if cfg.divide_by_n and cfg.combine != "logits":
        raise UserError(f"model.divide_by_n is true and model.combine {cfg.combine}: expected logits, which can be "
                        "divided")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A `models.model.Model`.

    Attributes:
        experts: M networks.
        gate: of M classes; None: every expert has the same weight.
        combine, divide_by_n, expert_norm: as in Config.
        served: k, or 0 for all.
        dispatch: how the top k are computed, where not all are.
    """

    experts: tuple[Network, ...]
    gate: Network | None = None
    combine: str = "logits"
    divide_by_n: bool = False
    served: int = 0
    expert_norm: str = "evaluation"
    dispatch: Dispatch = Dispatch("blocks")

    @property
    def num_members(self) -> int:
        return len(self.experts)

    @property
    def kind(self) -> str:
        kinds = dict.fromkeys(expert.kind for expert in self.experts)
        gate = "" if self.gate else ", the same weight for each"
        return (f"mixture of {self.num_members} {' and '.join(kinds)}{gate}"
                f"{f', the {self.served} best of the gate' if self.served else ''}")

    @property
    def about(self) -> str:
        return f"experts: top {self.served}, {self.dispatch.kind}" if self.served else ""

    @property
    def members(self) -> tuple[str, ...]:
        """Groups of the experts."""
        return tuple(f"expert{i}" for i in range(self.num_members))

    @property
    def groups(self) -> tuple[str, ...]:
        return (*((GATE,) if self.gate else ()), *self.members)

    @property
    def optim(self) -> Mapping[str, str]:
        return dict.fromkeys(self.groups, "backbone")

    @property
    def views(self) -> tuple[str, ...]:
        """Through the gate and the experts that count; the gate held constant; and where the others are left out,
        through these too, as if all were computed."""
        return ("through", *(("constant",) if self.gate else ()), *(("others",) if self.served else ()))

    @property
    def surfaces(self) -> Mapping[str, Callable[[dict[str, Any]], jax.tree_util.Partial]]:
        return {"gated": self.outputs_fn}

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(spec for group, net in self._networks.items() for spec in layers_within(f"{group}/", net.layers))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.experts[0].image_shape

    @property
    def num_classes(self) -> int:
        return self.experts[0].num_classes

    @property
    def _networks(self) -> dict[str, Network]:
        """{group: network}."""
        return ({GATE: self.gate} if self.gate else {}) | dict(zip(self.members, self.experts))

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """A gate and experts that start independently."""
        found = {group: net.init(rng.stream(key, group)) for group, net in self._networks.items()}
        return {part: {group: of[part] for group, of in found.items()} for part in ("params", "batch_stats")}

    def in_training(self, computing) -> "Mixture":
        return dataclasses.replace(self, experts=tuple(net.in_training(computing) for net in self.experts),
                                   gate=self.gate and self.gate.in_training(computing))

    def in_program(self) -> "Mixture":
        """As Model.in_program: every expert is computed."""
        return dataclasses.replace(self, dispatch=Dispatch("all"))

    def gather(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As Model.gather: a run for each expert, the gate starting afresh; or a mixture, whole."""
        if len(parts) == 1 and set(parts[0]) - {"backbone"}:
            return dict(parts[0])
        if len(parts) != self.num_members:
            raise UserError(f"init_from names {len(parts)} runs: expected {self.num_members} (model.num_members), one "
                            "for each expert, or one mixture")
        return ({GATE: None} if self.gate else {}) | dict(zip(self.members, map(dict, parts)))

    def outputs_fn(self, variables: dict[str, Any], view: str = "through") -> jax.tree_util.Partial:
        """As Model.outputs_fn; aux has member_logits (B, M, K) of all experts and gate_logits (B, M).

        Args:
            variables: of the mixture.
            view: one of `views`; "none" is the first.
        """
        return jax.tree_util.Partial(_evaluate, _Static(self, "through" if view == "none" else view), variables)

    def train_pass(self, variables: dict[str, Any], x: jax.Array
                   ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """As Model.train_pass, with all experts; aux has member_logits (B, P, M, K) and gate_logits (B, P, M). The
        gate normalises by the batch, the experts by their own statistics unless `expert_norm` says otherwise."""
        logits, gate_logits, stats = self.passes(variables, x)
        flat = self._together(*(leaf.reshape(-1, *leaf.shape[2:]) for leaf in (logits, gate_logits)))
        return flat.reshape(*x.shape[:2], -1), {"member_logits": logits, "gate_logits": gate_logits}, stats

    def passes(self, variables: dict[str, Any], x: jax.Array, own: jax.Array | None = None
               ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """What `train_pass` is made of: member_logits (B, P, M, K), gate_logits (B, P, M) and the statistics.

        Args:
            variables: of the mixture.
            x: (B, P, H, W, C).
            own: (B, M, H, W, C), an image for each expert alone, which is one pass more of it.
        """
        begin, stats, found = x.shape[:2], dict(variables["batch_stats"]), []
        gate_logits = jnp.zeros((*begin, self.num_members), x.dtype)
        if self.gate:
            gate_logits, _, stats[GATE] = self.gate.train_pass(of_group(variables, GATE), x)
        if own is None and self.expert_norm == "evaluation":
            logits = self._experts(variables, x.reshape(-1, *x.shape[2:]))
            return logits.reshape(*begin, *logits.shape[1:]), gate_logits, stats
        for i, (group, net) in enumerate(zip(self.members, self.experts)):
            seen = x if own is None else jnp.concatenate([x, own[:, i, None]], 1)
            if self.expert_norm == "training":
                logits, _, stats[group] = net.train_pass(of_group(variables, group), seen)
            else:
                logits = net.apply(of_group(variables, group), seen.reshape(-1, *seen.shape[2:]))[0]
            found.append(logits.reshape(*seen.shape[:2], -1))
        return jnp.stack(found, 2), gate_logits, stats

    def expert_fn(self, variables: dict[str, Any], ids: jax.Array) -> jax.tree_util.Partial:
        """x (B, H, W, C) -> (logits (B, K), {}) of the expert that is named for each image.

        Args:
            variables: of the mixture.
            ids: (B,) int32.
        """
        return jax.tree_util.Partial(_named, _Static(self, ""), variables, ids)

    def metrics(self, passes: Mapping[str, Any]) -> dict[str, jax.Array]:
        return gate_facts.metrics(passes)

    def progress(self, means: Mapping[str, Any]) -> str:
        return gate_facts.progress(means)

    def watch(self, means: Mapping[str, Any], batch_size: int, iterations: int) -> tuple[str, ...]:
        return ()

    def observe(self, aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"gate_weights": jax.nn.softmax(aux["gate_logits"]),
                "member_predictions": jnp.argmax(aux["member_logits"], -1).astype(jnp.int32)}

    def facts(self, y: np.ndarray, clean: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray],
              among: np.ndarray) -> dict[str, Any]:
        return gate_facts.facts(y, clean, attacked, among, self.served or self.num_members)

    def fact_tables(self, facts: Mapping[str, Any]) -> list[Table]:
        return [gate_facts.fact_table(facts)]

    def costs(self, masks: Any = None, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Pathway: the experts that an image takes, of the k best those that were measured, else k / M of each; router:
        the gate."""
        count = self.num_members
        shares = (facts or {}).get("taken") or [(self.served or count) / count] * count
        parts = [net.costs((masks or {}).get(group)) for group, net in zip(self.members, self.experts)]
        gate = self.gate.costs((masks or {}).get(GATE)) if self.gate else {}

        def mean(name):
            return sum(share * part[name] for share, part in zip(shares, parts))

        pathway, router = round(mean("total")), gate.get("total", 0)
        return {"pathway": pathway, "router": router, "total": pathway + router,
                "executed": round(mean("executed")) + gate.get("executed", 0),
                "params": sum(part["params"] for part in parts) + gate.get("params", 0)}

    def layer_costs(self, masks: Any = None) -> tuple[LayerCost, ...]:
        return tuple(cost for group, net in self._networks.items()
                     for cost in costs_within(f"{group}/", net.layer_costs((masks or {}).get(group))))

    def _together(self, member_logits, gate_logits):
        """(B, M, K), (B, M) -> (B, K), of all experts."""
        if self.combine == "logits":
            return mix(member_logits, gate_logits, divide_by_n=self.divide_by_n)
        return gating.combined(member_logits, jax.nn.softmax(gate_logits), self.combine)

    def _scores(self, variables, x):
        """(B, M) logits of the gate."""
        if self.gate is None:
            return jnp.zeros((x.shape[0], self.num_members), x.dtype)
        return self.gate.apply(of_group(variables, GATE), x)[0]

    @property
    def is_alike(self) -> bool:
        """Whether all experts are of one architecture: then they are one program, over their weights."""
        return all(net == self.experts[0] for net in self.experts)

    def _experts(self, variables, x):
        """(B, M, K) of all experts, normalised by their own statistics."""
        if self.is_alike:
            found = jax.lax.map(lambda own: self.experts[0].apply(own, x)[0], self._stacked(variables))
            return jnp.moveaxis(found, 0, 1)
        return jnp.stack([net.apply(of_group(variables, group), x)[0]
                          for group, net in zip(self.members, self.experts)], 1)

    def _stacked(self, variables):
        return stacked([of_group(variables, group) for group in self.members])

    def _best(self, variables, x, gate_logits):
        """(B, K) of the k best experts of each image, the others not computed."""
        ids, weights = gating.top(gate_logits, self.served)
        found = gating.combined(self._of(variables, x, ids), weights, self.combine)
        return found / self.num_members if self.divide_by_n else found

    def _of(self, variables, x, ids):
        """(B, k, K) of the experts (B, k) that are named for each image, the others not computed."""
        if self.dispatch.kind == "all":
            return jnp.take_along_axis(self._experts(variables, x), ids[..., None], 1)
        repeated = jnp.repeat(x, ids.shape[1], 0)
        shaped = jnp.zeros((len(repeated), self.num_members), x.dtype)
        choice, _ = dispatch.choose(shaped, routing.fixed(ids.reshape(-1)), 0, self.dispatch)
        weighed = self._stacked(variables) if self.is_alike else {
            group: of_group(variables, group) for group in self.members}
        return dispatch.pathways(self._chosen, weighed, repeated, choice).reshape(*ids.shape, -1)

    def _chosen(self, weighed, x, choice):
        """(T, K) of one expert, that of a block."""
        if self.is_alike:
            own = jax.tree.map(lambda leaf: jnp.take(leaf, choice.expert, axis=0), weighed)
            return self.experts[0].apply(own, x)[0]
        branches = [functools.partial(_logits, net) for net in self.experts]
        return jax.lax.switch(choice.expert, [lambda weighed, x, of=of, group=group: of(weighed[group], x)
                                              for of, group in zip(branches, self.members)], weighed, x)


class _Linear(nn.Module):
    """A gate in the place of a backbone: one linear layer on the pixels."""

    num_members: int

    @nn.compact
    def __call__(self, x, choose, train):
        """(B, H, W, C) images -> (B, M)."""
        return nn.Dense(self.num_members, name="linear")(x.reshape(x.shape[0], -1))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A mixture and a view of it as a part of a tree that holds no arrays."""

    mixture: Mixture
    view: str


def _evaluate(static, variables, x):
    """Logits as users get them, and what all experts and the gate say. Where the k best are served, a program that
    does not ask for `member_logits` computes no other experts."""
    mixture, view = static.mixture, static.view
    gate_logits = mixture._scores(variables, x)
    used = jax.lax.stop_gradient(gate_logits) if view == "constant" else gate_logits
    member_logits = mixture._experts(variables, x)
    aux = {"member_logits": member_logits, "gate_logits": gate_logits}
    if not mixture.served:
        return mixture._together(member_logits, used), aux
    logits = mixture._best(variables, x, used)
    if view == "others":
        every = mixture._together(member_logits, gate_logits)
        logits = jax.lax.stop_gradient(logits) + (every - jax.lax.stop_gradient(every))
    return logits, aux


def _named(static, variables, ids, x):
    return static.mixture._of(variables, x, ids[:, None])[:, 0], {}


def _logits(net, variables, x):
    return net.apply(variables, x)[0]


def model(cfg, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh | None = None) -> Mixture:
    """Builds the mixture that `config.model` describes. Arguments as `models.model.make`.

    Raises:
        UserError: fields do not fit together.
    """
    _check(cfg)

    def built(classes, width):
        own = cfg.copy_and_resolve_references()
        own.width = width
        return network.make(own, image_shape, classes, mesh, name=cfg.member)

    widths = _widths(cfg.widths) or (cfg.width,) * cfg.num_members
    of_width = {width: built(num_classes, width) for width in widths}
    gate = None if cfg.gate == "uniform" else built(cfg.num_members, cfg.gate_width or cfg.width)
    if cfg.gate == "linear":
        gate = dataclasses.replace(gate, module=gate.module.clone(backbone=_Linear(cfg.num_members)), backbone="linear")
    kind = "blocks" if jax.default_backend() == "cpu" else "all"
    return Mixture(tuple(of_width[width] for width in widths), gate, cfg.combine, cfg.divide_by_n,
                   _served(cfg.serve), cfg.expert_norm, Dispatch(kind, mesh))
