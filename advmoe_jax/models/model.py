"""What a model is to everything outside this room: pure functions over its variables, and what it says of itself.

B batch, P passes, K classes, m images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from advmoe_jax.core import find
from advmoe_jax.core.fields import setting
from advmoe_jax.core.layer_spec import LayerSpec
from advmoe_jax.core.tables import Table
from advmoe_jax.models import needs, network, normalisation
from advmoe_jax.models.macs import LayerCost

Variables = dict[str, Any]
"""{"params": {group: tree}, "batch_stats": {group: tree}}."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The field of `config.model` that names the others."""

    name: str = setting("resnet", "a module of advmoe_jax.models", room=("models", "backbone", "model"))


@dataclasses.dataclass(frozen=True)
class Computing:
    """Fields of `config.train` that say how training computes the model. Evaluations compute in float32."""

    precision: str = setting("float32", "of the backbone in training and its attacks; parameters, routers, losses and "
                                        "statistics are float32", choices=("float32", "bfloat16"))
    remat: bool = setting(False, "compute the inside of blocks again for gradients: less memory, a third more time")


def check(config) -> None:
    """Raises UserError for a mean without a standard deviation, or of other channels, and for a layer without
    channels."""
    if "mean" in config.model:
        normalisation.check(config.model.mean, config.model.std)
    needs.check_channels(config.model)


class Model(Protocol):
    """A network, an ensemble, a mixture of experts, a compact pruned network.

    Attributes:
        kind: what it is in tables, "Dense", "MoE".
        about: one line for the log on how it is computed; may be empty.
        groups: names of the parameter groups; each has an optimizer of its own.
        optim: {group: name below `config.optim`}.
        views: gradients that an honest evaluation attacks through, all with the same values; the first is the plain
            one.
        surfaces: other functions that attacks may ask for by `About.takes`, {name: variables -> Partial}.
        layers: every layer, as traced.
        image_shape: (H, W, C).
        num_classes: K.
        shapes: of the variables, without computing any.
    """

    kind: str
    about: str
    groups: tuple[str, ...]
    optim: Mapping[str, str]
    views: tuple[str, ...]
    surfaces: Mapping[str, Callable[[Variables], jax.tree_util.Partial]]
    layers: tuple[LayerSpec, ...]
    image_shape: tuple[int, int, int]
    num_classes: int
    shapes: Variables

    def init(self, key: jax.Array) -> Variables:
        """Fresh variables."""

    def in_training(self, computing: Computing) -> "Model":
        """The same model as training computes it."""

    def in_program(self) -> "Model":
        """The same model as a program computes it that is made for batches of any size: no host sorts its images, and
        no plan of them can be made."""

    def gather(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Trees by group of finished runs (parameters, statistics or masks), in their order, as trees of this model;
        None for a group that starts afresh.

        Raises:
            UserError: it takes another number of runs.
        """

    def outputs_fn(self, variables: Variables, view: str = "none") -> jax.tree_util.Partial:
        """x (B, H, W, C) in [0, 1] -> (logits (B, K), aux), in evaluation mode, the weights being arguments.

        `aux` holds what the kind has, each entry with leading B: router_logits (B, L, E), expert_ids and margins (B, L)
        of a routed network; member_logits (B, M, K) of an ensemble; these and gate_logits (B, M) of a mixture.
        """

    def train_pass(self, variables: Variables, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """A loss pass: P passes over as many images, each normalised by its own statistics.

        Args:
            variables: params and batch_stats.
            x: (B, P, H, W, C).
        Returns:
            logits (B, P, K), aux with leading (B, P), and batch_stats, updated by one pass after the other.
        """

    def metrics(self, passes: Mapping[str, tuple[jax.Array, dict[str, jax.Array]]]) -> dict[str, jax.Array]:
        """What a training step logs beside losses and accuracies; `passes` are {"clean" | "adv": (logits, aux)}."""

    def progress(self, means: Mapping[str, Any]) -> str:
        """`metrics`, averaged, as words of the progress line; may be empty."""

    def watch(self, means: Mapping[str, Any], batch_size: int, iterations: int) -> tuple[str, ...]:
        """What is wrong by `metrics`, averaged over iterations of `batch_size` images, a sentence each; the loop tells
        each once while it lasts."""

    def observe(self, aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """What an evaluation keeps of each image, from aux: arrays with leading B."""

    def facts(self, y: np.ndarray, clean: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray],
              among: np.ndarray) -> dict[str, Any]:
        """What an evaluation says of the model, as JSON.

        Args:
            y: (m,) labels.
            clean, attacked: what `observe` gave of the images as they are, and under the attack that breaks most of
                them.
            among: (m,) bool, the images that were attacked.
        """

    def fact_tables(self, facts: Mapping[str, Any]) -> list[Table]:
        """`facts` as reports show them; the first column says what a row is."""

    def costs(self, masks: Any = None, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Of one image: "pathway", "router", "total", "executed" multiply-accumulates; and "params".

        Args:
            masks: of pruned parameters, as `State.masks`; None: dense.
            facts: measured ones, for models whose cost depends on the images.
        """

    def layer_costs(self, masks: Any = None) -> tuple[LayerCost, ...]:
        """What each layer costs, in the order of `layers`, as if every image were computed by all networks of a model
        of several. Arguments as `costs`."""


def output_shapes(model: Model) -> tuple[jax.ShapeDtypeStruct, dict[str, jax.ShapeDtypeStruct]]:
    """Logits and aux of one image, without computing anything."""
    x = jax.ShapeDtypeStruct((1, *model.image_shape), np.float32)
    return jax.eval_shape(lambda variables, x: model.outputs_fn(variables)(x), model.shapes, x)


def make(cfg, image_shape: tuple[int, int, int], num_classes: int, mesh: Mesh | None = None) -> Model:
    """Builds the model that `config.model` describes: a module of this room with a `backbone` is a network, one with
    `model(cfg, image_shape, num_classes, mesh)` builds its own.

    Raises:
        UserError: a field is out of range or names nothing, or the images are too small.
    """
    module = find.module("models", cfg.name, defines=("backbone", "model"), kind="model.name")
    needs.check_pixels(cfg, image_shape)
    build = getattr(module, "model", network.make)
    return build(cfg, image_shape, num_classes, mesh)
