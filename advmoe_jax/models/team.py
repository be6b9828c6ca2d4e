"""Networks of one kind that answer together, of which no more are asked than an image needs.

The Dynamic Inference Ensemble of EED (Jung & Song, CVPR 2025); its arithmetic is `ops.stopping`. A member is a
parameter group, as in an ensemble, and their order is that in which they are asked. Logits are logarithms of the team's
probabilities.

M members, B batch, P passes, K classes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from advmoe_jax.core import tables
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import Only, setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.core.tables import Table
from advmoe_jax.models import network, taps
from advmoe_jax.models.ensemble import Ensemble
from advmoe_jax.models.macs import LayerCost
from advmoe_jax.models.members import of_group, stacked
from advmoe_jax.models.network import Network
from advmoe_jax.ops import stopping
from advmoe_jax.ops.stopping import Rule

NEVER = "never"
_NOTE = ("Members asked until it is sure which of the first answers counts, and members whose mean that answer is, on "
         "clean images and on those that break most images of the team.")
_BLOCKS = 8  # sizes of the batch that is left


def _gate_is(*gates):
    return Only(f"model.gate {' or '.join(gates)}", lambda config: config.model.get("gate") in gates)


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.model` for a team, beside those of its members."""

    num_members: int = setting(4, "M, networks that are asked", least=2, most=64)
    member: str = setting("resnet", "backbone of the members", room=("models", "backbone"))
    combiner: str = setting("mean", "of the members' probabilities: their mean, or the largest of each class",
                            choices=stopping.COMBINERS)
    gate: str = setting("product", "what lets it stop, see ops/stopping.py; never: all are asked",
                        choices=(NEVER, *stopping.GATES))
    most_change: float = setting(0.1, "of the answer by the last member, as KL divergence", above=0, most=1e6,
                                 only=_gate_is("agreeing", "thresholds"))
    least_confidence: float = setting(0.5, "square of the largest probability", least=0, most=1,
                                      only=_gate_is("thresholds", "sigmoid"))
    gate_slope: float = setting(10.0, "of the sigmoid", above=0, most=1e6, only=_gate_is("sigmoid"))
    dispatch_members: str = setting("all", "members that are computed: all; or, outside traced programs, those that "
                                           "are asked, while images that are done leave the batch",
                                    choices=("all", "sequential"))


def check(config) -> None:
    """Raises UserError for members that are routed."""
    if config.model.num_experts != 1:
        raise UserError(f"model.num_experts is {config.model.num_experts}: expected 1 with model.name=team, whose "
                        "members are dense networks")


@dataclasses.dataclass(frozen=True)
class Team:
    """A `models.model.Model`.

    Attributes:
        ensemble: the members.
        rule: when enough of them have been asked; None: never.
        combiner: of ops.stopping.COMBINERS.
        is_sequential: whether only those are computed that are asked, where values are known.
        taps: whether loss passes say how active the layers are, see `taps.active`.
        features: whether they give what the members' last layers read.
    """

    ensemble: Ensemble
    rule: Rule | None
    combiner: str = "mean"
    is_sequential: bool = False
    taps: bool = False
    features: bool = False

    @property
    def member(self) -> Network:
        return self.ensemble.member

    @property
    def num_members(self) -> int:
        return self.ensemble.num_members

    @property
    def kind(self) -> str:
        return f"team of {self.num_members} {self.member.kind}"

    @property
    def about(self) -> str:
        return "members: asked one after the other" if self.is_sequential else ""

    @property
    def groups(self) -> tuple[str, ...]:
        return self.ensemble.groups

    @property
    def optim(self) -> Mapping[str, str]:
        return self.ensemble.optim

    @property
    def views(self) -> tuple[str, ...]:
        """Gradients of the answer that counts, where it stops being a constant; of that in expectation over where it
        stops; of the answer of all; and of each member."""
        return ("none", *(("soft", "average") if self.rule else ()), *self.groups)

    @property
    def logit_views(self) -> tuple[str, ...]:
        """Those that change the gradient of the logits alone: for what reads the members they are one."""
        return self.views[1:]

    @property
    def surfaces(self) -> Mapping[str, Callable[[dict[str, Any]], jax.tree_util.Partial]]:
        return {}

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return self.ensemble.layers

    @property
    def last_layer(self) -> LayerSpec:
        """The linear layer of a member that gives its logits, with a kernel (D, K)."""
        return [spec for spec in self.member.layers if len(spec.kernel) == 2][-1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.ensemble.image_shape

    @property
    def num_classes(self) -> int:
        return self.ensemble.num_classes

    @property
    def shapes(self) -> dict[str, Any]:
        return self.ensemble.shapes

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Members that start independently."""
        return self.ensemble.init(key)

    def in_training(self, computing) -> "Team":
        """All members, since all are trained: also training's attacks are on the answer of all."""
        return dataclasses.replace(self, ensemble=self.ensemble.in_training(computing), rule=None)

    def in_program(self) -> "Team":
        """As Model.in_program: every member is computed."""
        return dataclasses.replace(self, ensemble=self.ensemble.in_program(), is_sequential=False)

    def gather(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As Model.gather: a run for each member."""
        return self.ensemble.gather(parts)

    def outputs_fn(self, variables: dict[str, Any], view: str = "none") -> jax.tree_util.Partial:
        """As Model.outputs_fn; aux has member_logits (B, M, K), members_asked and members_used (B,).

        Views are arguments of one program. Members that are not computed have logits of 0.
        """
        return jax.tree_util.Partial(_evaluate, _Static(self), self.members(variables), np.int32(
            self.views.index(view)))

    def train_pass(self, variables: dict[str, Any], x: jax.Array
                   ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """As Model.train_pass; aux has member_logits (B, P, M, K), with `taps` activity and active (B, P, M), and with
        `features` these, (B, P, M, D)."""
        def of_taps(run):
            if not self.taps:
                return run(), {}
            found, smooth, share = taps.active(run)
            return found, {"activity": smooth.T, "active": share.T}

        def of_features(run):
            if not self.features:
                return run(), {}
            found, read = taps.inputs(run, self.last_layer.path)
            return found, {"features": jnp.moveaxis(read, 0, 1)}

        def one(variables):
            (((logits, _, stats), active), read) = of_features(
                lambda: of_taps(lambda: self.member.train_pass(variables, x)))
            return logits, stats, active | read

        logits, stats, more = jax.lax.map(one, stacked(self.members(variables)))
        logits, more = (jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 2), part) for part in (logits, more))
        answer = _answers(jax.nn.log_softmax(logits.reshape(-1, *logits.shape[2:])), self.combiner)[:, -1]
        return answer.reshape(*x.shape[:2], -1), {"member_logits": logits, **more}, {
            group: jax.tree.map(lambda leaf, i=i: leaf[i], stats) for i, group in enumerate(self.groups)}

    def members(self, variables: dict[str, Any]) -> list[dict[str, Any]]:
        """The variables of each member."""
        return [of_group(variables, group) for group in self.groups]

    def metrics(self, passes: Mapping[str, Any]) -> dict[str, jax.Array]:
        """As an ensemble's; with `taps` also the share of activations that are not zero."""
        *_, (_, aux) = passes.values()
        return self.ensemble.metrics(passes) | ({"active": jnp.mean(aux["active"])} if "active" in aux else {})

    def progress(self, means: Mapping[str, Any]) -> str:
        return self.ensemble.progress(means)

    def watch(self, means: Mapping[str, Any], batch_size: int, iterations: int) -> tuple[str, ...]:
        return ()

    def observe(self, aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return self.ensemble.observe(aux) | {name: aux[name] for name in ("members_asked", "members_used")}

    def facts(self, y: np.ndarray, clean: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray],
              among: np.ndarray) -> dict[str, Any]:
        """As an ensemble's; of clean and of attacked images the share that asks so many members or more, and the means
        of members asked and used."""
        found = self.ensemble.facts(y, clean, attacked, among)
        for name, of in {"clean": {k: v for k, v in clean.items()},
                         "attacked": {k: v[among] for k, v in attacked.items()}}.items():
            asked, used = of["members_asked"], of["members_used"]
            found[name] = {"asked": [float(np.mean(asked > i)) if len(asked) else 0.0 for i in range(self.num_members)],
                           "mean_asked": float(np.mean(asked)) if len(asked) else 0.0,
                           "mean_used": float(np.mean(used)) if len(used) else 0.0}
        return found

    def fact_tables(self, facts: Mapping[str, Any]) -> list[Table]:
        rows = [(name, tables.decimals(facts[name]["mean_asked"]), tables.decimals(facts[name]["mean_used"]),
                 *map(tables.percent, facts[name]["asked"])) for name in ("clean", "attacked")]
        columns = ("images", "asked", "used", *(f"{i + 1} or more, %" for i in range(self.num_members)))
        return [*self.ensemble.fact_tables(facts), Table("Members asked", columns, rows, (_NOTE,), varying=columns[1:])]

    def costs(self, masks: Any = None, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
        """The sums over the members, each as often as clean images ask it; "executed": as often as it is computed."""
        parts = [self.member.costs((masks or {}).get(group)) for group in self.groups]
        asked = facts["clean"]["asked"] if facts else [1.0] * self.num_members

        def total(name, often):
            return round(sum(part[name] * share for part, share in zip(parts, often)))

        every = [1] * self.num_members
        found = {name: total(name, asked) for name in ("pathway", "router", "total")}
        return found | {"executed": total("executed", asked if self.is_sequential else every),
                        "params": total("params", every)}

    def layer_costs(self, masks: Any = None) -> tuple[LayerCost, ...]:
        return self.ensemble.layer_costs(masks)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A team as a part of a tree that holds no arrays."""

    team: Team


def _evaluate(static, members, view, x):
    team = static.team
    if team.is_sequential and team.rule and not trees.is_traced((members, view, x)):
        return _decided(static, _one_after_the_other(static, members, x), view)
    logits = jax.lax.map(lambda variables: team.member.outputs_fn(variables)(x)[0], stacked(members))
    return _answered(team, jnp.moveaxis(logits, 0, 1), view)


def _answered(team, member_logits, view):
    """The answer that counts, with the gradient of a view, and aux."""
    log_p = jax.nn.log_softmax(member_logits)
    answers = _answers(log_p, team.combiner)
    used = asked = jnp.broadcast_to(jnp.int32(team.num_members), log_p.shape[:1])
    value, ways = answers[:, -1], []
    if team.rule:
        p = jnp.exp(log_p)
        found, asked = stopping.stop(p, team.rule), stopping.asked(p, team.rule)
        used, value = found.z, jnp.take_along_axis(answers, found.z[:, None, None] - 1, 1)[:, 0]
        weights = jnp.log(jnp.maximum(found.p, 1e-30) / jnp.maximum(jnp.sum(found.p, -1, keepdims=True), 1e-30))
        ways = [jax.nn.logsumexp(weights[..., None] + answers, 1), answers[:, -1]]
    ways = jnp.concatenate([jnp.stack([value, *ways], 1), log_p], 1)
    logits = _with_gradient_of(jax.lax.stop_gradient(value), jnp.take(ways, view, axis=1))
    return logits, {"member_logits": member_logits, "members_asked": asked, "members_used": used}


def _answers(log_p, combiner):
    """Logarithms of `stopping.answers`, (B, M, K) -> (B, M, K), also where a probability leaves float32."""
    found, total = [], None
    for t in range(log_p.shape[1]):
        new = log_p[:, t]
        if combiner == "max":
            total = new if total is None else jnp.maximum(total, new)
            found.append(jax.nn.log_softmax(total))
        else:
            total = new if total is None else jnp.logaddexp(total, new)
            found.append(total - np.float32(np.log(t + 1)))
    return jnp.stack(found, 1)


@jax.custom_vjp
def _with_gradient_of(value, way):
    """`value` as it is, with the gradient of `way`."""
    return value


_with_gradient_of.defvjp(lambda value, way: (value, None), lambda _, slope: (jnp.zeros_like(slope), slope))


# One after the other.

_decided = jax.jit(lambda static, member_logits, view: _answered(static.team, member_logits, view))


@jax.jit
def _of_member(static, variables, x, rows):
    return static.team.member.outputs_fn(variables)(jnp.take(x, rows, 0))[0]


@functools.partial(jax.jit, static_argnames="static")
def _is_over(static, logits):
    return stopping.is_over(jax.nn.softmax(logits), static.team.rule)


def _one_after_the_other(static, members, x):
    """Logits (B, M, K) of the members that are asked. Those of others are 0, and no answer depends on them."""
    count, size = len(members), len(x)
    devices = len(x.devices()) if isinstance(x, jax.Array) else 1
    block = max(-(-size // _BLOCKS // devices) * devices, devices)
    found, rows = np.zeros((size, count, static.team.num_classes), np.float32), np.arange(size)
    for t, variables in enumerate(members):
        full = min(-(-len(rows) // block) * block, size)
        padded = np.concatenate([rows, np.full(full - len(rows), rows[0])])
        found[padded, t] = np.asarray(_of_member(static, variables, x, padded))
        if t + 1 < count:
            rows = rows[~np.asarray(_is_over(static, found[padded, :t + 1]))[:len(rows)]]
        if not len(rows):
            break
    return jnp.asarray(found)


def model(cfg, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh | None = None) -> Team:
    """Builds the team that `config.model` describes. Arguments as `models.model.make`."""
    member = network.make(cfg, image_shape, num_classes, mesh, name=cfg.member)
    rule = None if cfg.gate == NEVER else Rule(cfg.gate, cfg.most_change, cfg.least_confidence, cfg.gate_slope,
                                               cfg.combiner)
    return Team(Ensemble(member, cfg.num_members), rule, cfg.combiner, cfg.dispatch_members == "sequential")
