"""Two mixtures of experts that answer together: a standard one and a robust one.

The dual model of Zhang et al., "Optimizing Robustness and Accuracy in Mixture of Experts", ICML 2025:
(1 - alpha) F_S + alpha F_R of their logits. To attacks it is one mixture of all experts, whose gate weighs those of the
robust one alpha in all. The gates and experts of both are parameter groups.

M experts of each, B batch, P passes, K classes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from advmoe_jax.core import rng
from advmoe_jax.core.errors import UserError
from advmoe_jax.core.fields import setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.core.tables import Table
from advmoe_jax.models import mixture
from advmoe_jax.models.macs import LayerCost
from advmoe_jax.models.members import costs_within, layers_within
from advmoe_jax.models.mixture import Mixture

PARTS = ("standard", "robust")


@dataclasses.dataclass(frozen=True)
class Config(mixture.Config):
    """Fields of `config.model` for a dual model, beside those that both mixtures share."""

    alpha: float = setting(0.7, "weight of the robust mixture; the standard one has the rest", above=0, most=1)


def check(config) -> None:
    """Raises UserError for fields that do not fit together."""
    mixture.check(config)
    if config.model.alpha == 1:
        raise UserError("model.alpha is 1: expected less, or model.name=mixture, the robust mixture alone")


@dataclasses.dataclass(frozen=True)
class Dual:
    """A `models.model.Model`.

    Attributes:
        mixture: what each of both is.
        alpha: weight of the robust one.
    """

    mixture: Mixture
    alpha: float

    @property
    def kind(self) -> str:
        return f"dual model of alpha {self.alpha:g}, each a {self.mixture.kind}"

    @property
    def about(self) -> str:
        return self.mixture.about

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(group for part in PARTS for group in self.groups_of(part))

    def groups_of(self, part: str) -> tuple[str, ...]:
        """Those of one of PARTS."""
        return tuple(f"{part}_{group}" for group in self.mixture.groups)

    @property
    def optim(self) -> Mapping[str, str]:
        return dict.fromkeys(self.groups, "backbone")

    @property
    def views(self) -> tuple[str, ...]:
        """Those of both mixtures at once."""
        return self.mixture.views

    @property
    def surfaces(self) -> Mapping[str, Callable[[dict[str, Any]], jax.tree_util.Partial]]:
        return {"gated": self.outputs_fn}

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(spec for part in PARTS for spec in layers_within(f"{part}_", self.mixture.layers))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.mixture.image_shape

    @property
    def num_classes(self) -> int:
        return self.mixture.num_classes

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        return jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Mixtures that start independently."""
        found = [named(self.mixture.init(rng.stream(key, part)), part) for part in PARTS]
        return {of: found[0][of] | found[1][of] for of in found[0]}

    def in_training(self, computing) -> "Dual":
        return dataclasses.replace(self, mixture=self.mixture.in_training(computing))

    def in_program(self) -> "Dual":
        """As Model.in_program: every expert is computed."""
        return dataclasses.replace(self, mixture=self.mixture.in_program())

    def gather(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """As Model.gather: the standard mixture and the robust one; or a dual model, whole."""
        if len(parts) == 1 and set(parts[0]) <= set(self.groups):
            return dict(parts[0])
        if len(parts) != len(PARTS):
            raise UserError(f"init_from names {len(parts)} runs: expected two mixtures, the standard one and the "
                            "robust one, or one dual model")
        return {f"{part}_{group}": of for part, groups in zip(PARTS, parts) for group, of in groups.items()}

    def outputs_fn(self, variables: dict[str, Any], view: str = "through") -> jax.tree_util.Partial:
        """As Model.outputs_fn; aux has member_logits (B, 2 M, K) of all experts and gate_logits (B, 2 M), whose softmax
        is the weight of each in the whole."""
        return jax.tree_util.Partial(_evaluate, _Alpha(self.alpha), [
            self.mixture.outputs_fn(of_part(variables, part), view) for part in PARTS])

    def train_pass(self, variables: dict[str, Any], x: jax.Array
                   ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """As Model.train_pass of both; aux as that of `outputs_fn` with leading (B, P)."""
        found = [self.mixture.train_pass(of_part(variables, part), x) for part in PARTS]
        stats = {f"{part}_{group}": of for part, (*_, groups) in zip(PARTS, found) for group, of in groups.items()}
        return *self.together([of[:2] for of in found]), stats

    def together(self, outputs: Sequence[tuple[jax.Array, dict[str, jax.Array]]]
                 ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(logits, aux) of those of the standard and the robust mixture."""
        return _together(self.alpha, outputs)

    def metrics(self, passes: Mapping[str, Any]) -> dict[str, jax.Array]:
        return self.mixture.metrics(passes)

    def progress(self, means: Mapping[str, Any]) -> str:
        return self.mixture.progress(means)

    def watch(self, means: Mapping[str, Any], batch_size: int, iterations: int) -> tuple[str, ...]:
        return self.mixture.watch(means, batch_size, iterations)

    def observe(self, aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
        count = self.mixture.num_members
        parts = {part: {name: leaf[:, i * count:(i + 1) * count] for name, leaf in aux.items()}
                 for i, part in enumerate(PARTS)}
        return {f"{part}_{name}": leaf for part, of in parts.items()
                for name, leaf in self.mixture.observe(of).items()}

    def facts(self, y: np.ndarray, clean: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray],
              among: np.ndarray) -> dict[str, Any]:
        """{part: those of the mixture}."""
        return {part: self.mixture.facts(y, _own(clean, part), _own(attacked, part), among) for part in PARTS}

    def fact_tables(self, facts: Mapping[str, Any]) -> list[Table]:
        return [dataclasses.replace(table, title=f"{table.title} of the {part} mixture")
                for part in PARTS for table in self.mixture.fact_tables(facts[part])]

    def costs(self, masks: Any = None, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
        """The sums over both."""
        found = [self.mixture.costs(_own(masks or {}, part), (facts or {}).get(part)) for part in PARTS]
        return {name: sum(of[name] for of in found) for name in found[0]}

    def layer_costs(self, masks: Any = None) -> tuple[LayerCost, ...]:
        return tuple(cost for part in PARTS
                     for cost in costs_within(f"{part}_", self.mixture.layer_costs(_own(masks or {}, part))))


def of_part(variables: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The variables of one of PARTS as those of a mixture."""
    return {name: _own(groups, part) for name, groups in variables.items()}


def _own(found, part):
    """What is named of one of PARTS, by the names that it has in the mixture."""
    return {name.removeprefix(f"{part}_"): of for name, of in found.items() if name.startswith(f"{part}_")}


def named(variables: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The reverse of `of_part`."""
    return {name: {f"{part}_{group}": of for group, of in groups.items()} for name, groups in variables.items()}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Alpha:
    """A number as a part of a tree that holds no arrays."""

    value: float


def _evaluate(alpha, parts, x):
    return _together(alpha.value, [of(x) for of in parts])


def _together(alpha, outputs):
    (standard, aux), (robust, more) = outputs
    scores = [jax.nn.log_softmax(of["gate_logits"]) + math.log(share)
              for of, share in ((aux, 1 - alpha), (more, alpha))]
    return (1 - alpha) * standard + alpha * robust, {
        "member_logits": jnp.concatenate([aux["member_logits"], more["member_logits"]], -2),
        "gate_logits": jnp.concatenate(scores, -1)}


def model(cfg, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh | None = None) -> Dual:
    """Builds the dual model that `config.model` describes. Arguments as `models.model.make`."""
    return Dual(mixture.model(cfg, image_shape, num_classes, mesh), cfg.alpha)
