"""The weights of a run as one safetensors file: what an export leaves in the place of checkpoints.

A tensor is called as its path in the variables, with dots: "params.backbone.conv1.kernel". Masks of a pruned run are in
a file beside, so that the first holds what the model's functions take and nothing else.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from advmoe_jax.core import tensor_files, tree
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.ops import masks as masking
from advmoe_jax.train.state import Trained

FILE, MASKS = "model.safetensors", "masks.safetensors"
_ORIGIN = "advmoe_jax"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where weights come from, as their file says.

    Attributes:
        workdir: of the run, as it was then.
        checkpoint: "best", "last", "ema" or a step.
        step: of the checkpoint.
        image_shape: (H, W, C).
        num_classes: K.
        export: fields of `config.export` that say how they were exported.
    """

    workdir: str
    checkpoint: str
    step: int
    image_shape: tuple[int, int, int]
    num_classes: int
    export: dict[str, str]

    @property
    def of_images(self) -> tuple[tuple[int, int, int], int]:
        """(H, W, C) and K."""
        return tuple(self.image_shape), self.num_classes


def flat(variables: Mapping[str, Any]) -> dict[str, Any]:
    """{"params.backbone.conv1.kernel": leaf} of a tree."""
    return {name.replace("/", "."): leaf for name, leaf in tree.named_leaves(variables).items()}


def nested(tensors: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What `flat` gave, as a tree like `shapes`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: tensors[tree.path_name(path).replace("/", ".")], shapes)


def is_in(workdir: epath.PathLike) -> bool:
    """Whether a folder holds the weights of an export."""
    return (epath.Path(workdir) / FILE).exists()


def write(folder: epath.Path, trained: Trained, origin: Origin, about: Mapping[str, Any]) -> None:
    """Writes variables and masks.

    Args:
        folder: gets the files.
        trained: what they hold.
        origin: where they come from.
        about: {name: what JSON holds} that is kept in the header too.
    """
    said = {_ORIGIN: dataclasses.asdict(origin), **about}
    tensor_files.write(folder / FILE, flat(trained.variables), {name: json.dumps(of) for name, of in said.items()})
    if masks := flat(trained.masks):
        tensor_files.write(folder / MASKS, masks, {})


def origin(workdir: epath.PathLike) -> Origin:
    """Where the weights in a folder come from.

    Raises:
        UserError: they were not written by `write`.
    """
    path = epath.Path(workdir) / FILE
    try:
        return Origin(**json.loads(tensor_files.about(path)[_ORIGIN]))
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} does not say of which run it is: expected what --mode export wrote") from None


@dataclasses.dataclass(frozen=True)
class Weights:
    """In a workdir's place of `checkpoint.Checkpoints`, to read from."""

    workdir: epath.Path

    def step(self, which: str) -> int:
        """The step of the one checkpoint that was exported, whose name alone is known.

        Args:
            which: its name, or its step; "best" stands for it too, since that is what other runs start from.
        Raises:
            UserError: another one.
        """
        of = origin(self.workdir)
        one_of("checkpoint of an export", which, dict.fromkeys((of.checkpoint, "best", str(of.step))))
        return of.step

    def restore_trained(self, which: str, abstract: dict[str, Any], sharding: jax.sharding.Sharding | None = None
                        ) -> Trained:
        """As `checkpoint.Checkpoints.restore_trained`."""
        self.step(which)
        path = self.workdir / FILE
        tensors, wanted = tensor_files.read(path), flat(abstract)
        if different := tree.first_difference(wanted, tensors):
            name, ours, theirs = different
            raise UserError(f"{path} is of another architecture: {name} is {theirs} there, the config's model has "
                            f"{ours}")
        variables, masks = nested(tensors, abstract), {}
        if (self.workdir / MASKS).exists():
            named = {name.replace(".", "/"): mask for name, mask in tensor_files.read(self.workdir / MASKS).items()}
            found = masking.of_leaves(variables["params"], named)
            masks = {group: part for group, part in found.items() if jax.tree.leaves(part)}
        return placed(Trained(variables, masks), sharding)


def placed(trained: Trained, sharding: jax.sharding.Sharding | None) -> Trained:
    """The same arrays with a sharding; None: as they are."""
    if sharding is None:
        return trained
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(
        leaf.shape, sharding, lambda index, leaf=leaf: leaf[index]), trained)
