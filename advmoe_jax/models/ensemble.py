"""The mean of the logits of several networks of one kind.

M members, B batch, P passes, K classes. A member is a parameter group, and so is trained, frozen and saved whole.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from advmoe_jax.core import rng, tables
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.core.tables import Table
from advmoe_jax.models import network
from advmoe_jax.models.macs import LayerCost
from advmoe_jax.models.members import costs_within, layers_within, of_group
from advmoe_jax.models.network import Network

_NOTE = "Accuracies of the members alone, on the clean images and on those that break most images of the ensemble."


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.model` for an ensemble, beside those of its members."""

    num_members: int = setting(3, "M, networks whose logits are averaged", least=2, most=64)
    member: str = setting("resnet", "backbone of the members", room=("models", "backbone"))


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """A `models.model.Model`.

    Attributes:
        member: what each of them is.
        num_members: M.
    """

    member: Network
    num_members: int

    @property
    def kind(self) -> str:
        return f"ensemble of {self.num_members} {self.member.kind}"

    @property
    def about(self) -> str:
        return self.member.about

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(f"member{i}" for i in range(self.num_members))

    @property
    def optim(self) -> Mapping[str, str]:
        return dict.fromkeys(self.groups, "backbone")

    @property
    def views(self) -> tuple[str, ...]:
        return self.member.views

    @property
    def surfaces(self) -> Mapping[str, Callable[[dict[str, Any]], jax.tree_util.Partial]]:
        return {}

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        layers = self.member.layers
        return tuple(spec for group in self.groups for spec in layers_within(f"{group}/", layers))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.member.image_shape

    @property
    def num_classes(self) -> int:
        return self.member.num_classes

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Members that start independently."""
        members = [self.member.init(rng.stream(key, group)) for group in self.groups]
        return {part: self.gather([member[part] for member in members]) for part in members[0]}

    def in_training(self, computing) -> "Ensemble":
        return dataclasses.replace(self, member=self.member.in_training(computing))

    def in_program(self) -> "Ensemble":
        return dataclasses.replace(self, member=self.member.in_program())

    def gather(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As Model.gather: a run for each member."""
        if len(parts) != self.num_members:
            raise UserError(f"init_from names {len(parts)} runs: expected {self.num_members} (model.num_members), one "
                            "for each member")
        return dict(zip(self.groups, map(dict, parts)))

    def outputs_fn(self, variables: dict[str, Any], view: str = "none") -> jax.tree_util.Partial:
        """As Model.outputs_fn; aux has member_logits (B, M, K)."""
        return jax.tree_util.Partial(_evaluate, [self.member.outputs_fn(of_group(variables, group), view)
                                                 for group in self.groups])

    def train_pass(self, variables: dict[str, Any], x: jax.Array
                   ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """As Model.train_pass; aux has member_logits (B, P, M, K)."""
        logits, _, stats = zip(*(self.member.train_pass(of_group(variables, group), x) for group in self.groups))
        return *_mean(logits), dict(zip(self.groups, stats))

    def metrics(self, passes: Mapping[str, Any]) -> dict[str, jax.Array]:
        """How many of the images of the last pass the members disagree on."""
        *_, (_, aux) = passes.values()
        answers = jnp.argmax(aux["member_logits"], -1)
        return {"disagreement": jnp.mean(jnp.any(answers != answers[:, :1], -1))}

    def progress(self, means: Mapping[str, Any]) -> str:
        return f"members disagree on {100 * np.asarray(means['disagreement']):.0f} %"

    def watch(self, means: Mapping[str, Any], batch_size: int, iterations: int) -> tuple[str, ...]:
        return ()

    def observe(self, aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"member_predictions": jnp.argmax(aux["member_logits"], -1).astype(jnp.int32)}

    def facts(self, y: np.ndarray, clean: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray],
              among: np.ndarray) -> dict[str, Any]:
        right, still = (found["member_predictions"] == y[:, None] for found in (clean, attacked))
        return {"member_sa": right.mean(0).tolist(), "member_ra": (right & still).mean(0).tolist()}

    def fact_tables(self, facts: Mapping[str, Any]) -> list[Table]:
        rows = [(str(i), *map(tables.percent, rates))
                for i, rates in enumerate(zip(facts["member_sa"], facts["member_ra"]))]
        return [Table("Members", ("member", "SA %", "RA %"), rows, (_NOTE,), varying=("RA %",))]

    def costs(self, masks: Any = None, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
        """The sums over the members."""
        parts = [self.member.costs((masks or {}).get(group)) for group in self.groups]
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def layer_costs(self, masks: Any = None) -> tuple[LayerCost, ...]:
        return tuple(cost for group in self.groups
                     for cost in costs_within(f"{group}/", self.member.layer_costs((masks or {}).get(group))))


def _mean(member_logits):
    stacked = jnp.stack(member_logits, -2)
    return jnp.mean(stacked, -2), {"member_logits": stacked}


def _evaluate(members, x):
    return _mean([member(x)[0] for member in members])


def model(cfg, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh | None = None) -> Ensemble:
    """Builds the ensemble that `config.model` describes. Arguments as `models.model.make`."""
    member = network.make(cfg, image_shape, num_classes, mesh, name=cfg.member)
    return Ensemble(member, cfg.num_members)
