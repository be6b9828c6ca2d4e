"""How much of a sparse network the pathways of a routed one share: intersection over union of their channels.

Zhang et al., ICCV 2023, figure 6. Channels are those of the dense backbone, of all routed layers together. m images,
L routed choices, R routed layers, E experts, C channels of a layer.
"""

import dataclasses
from typing import Any

import numpy as np

from advmoe_jax.core import tree
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import masks as masking
from advmoe_jax.ops import routing
from advmoe_jax.report.trained import Trained

STEP = 0.01
"""Width of the bins of a density."""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Channels that pathways and a mask share.

    Attributes:
        shared: (R, E) channels of an expert that the mask keeps.
        widths: (R,) channels of an expert.
        kept: (R,) channels that the mask keeps.
        sizes: (R,) channels C of the dense layer.
    """

    shared: np.ndarray
    widths: np.ndarray
    kept: np.ndarray
    sizes: np.ndarray

    def iou(self, experts: np.ndarray) -> np.ndarray:
        """(m,) in [0, 1], of the pathways (m, L) of images. One choice for all layers is L = 1."""
        layers = np.arange(len(self.widths))
        both = self.shared[layers, experts[:, np.minimum(layers, experts.shape[1] - 1)]].sum(1)
        return both / (self.widths.sum() + self.kept.sum() - both)

    @property
    def chance(self) -> float:
        """What masks that keep as many channels of each layer, drawn at random, tend to: 1/3 where halves meet halves.

        The mean intersection over the union that goes with it.
        """
        both = np.sum(self.widths * self.kept / self.sizes)
        return float(both / (self.widths.sum() + self.kept.sum() - both))


def of(run: Trained, sparse: Trained, said: str) -> Overlap:
    """The channels of a routed network's experts beside those that a sparse run keeps of the dense one.

    Args:
        run: the routed network's.
        sparse: a dense network's, with masks of whole channels.
        said: how an error names the latter, "--against names runs/a".
    Raises:
        UserError: it is routed itself, has no masks, or masks of other than whole channels, or keeps all of the routed
            layers; or its channels are not those of the experts.
    """
    if "routed" in sparse.model.surfaces:
        raise UserError(f"{said}, a {sparse.model.kind}: expected a dense network of which channels are pruned")
    num_experts, layers = run.config.model.num_experts, [spec for spec in run.model.layers if spec.routed]
    found, masks = {spec.path: spec for spec in sparse.model.layers}, tree.named_leaves(sparse.masks)
    if not masks:
        raise UserError(f"{said}, which has no masks: expected a run that prunes whole channels, such as one of "
                        "system.name=mask_search with system.unit=filter")
    shared, kept = np.zeros((len(layers), num_experts), int), np.zeros(len(layers), int)
    for row, spec in enumerate(layers):
        other = found.get(spec.path)
        if other is None or other.kernel[:2] != spec.kernel[:2] or other.kernel[-1] != spec.kernel[-1]:
            there = f"has a kernel {other.kernel}" if other else "is not"
            raise UserError(f"{said}, of another architecture: {spec.path} {there} there, and the experts' is "
                            f"{spec.kernel}; expected a dense network of as many channels, which those of "
                            "model.experts=disjoint have only where they share out the layer")
        channels = _channels(masks.get(f"{spec.path}/kernel"), other.kernel, f"{said}: {spec.path}")
        starts = routing.offsets(num_experts, spec.width, spec.kernel[-1], run.config.model.experts)
        shared[row] = [channels[start:start + spec.width].sum() for start in starts]
        kept[row] = channels.sum()
    sizes = np.array([spec.kernel[-1] for spec in layers])
    if np.array_equal(kept, sizes):
        raise UserError(f"{said}, which keeps every channel of the layers that have experts: expected one that prunes "
                        "some of them")
    return Overlap(shared, np.array([spec.width for spec in layers]), kept, sizes)


def _channels(mask: Any, kernel: tuple[int, ...], said: str) -> np.ndarray:
    """(C,) bool, the output channels that a mask keeps. Raises UserError if it keeps parts of some."""
    if mask is None:
        return np.ones(kernel[-1], bool)
    full = np.broadcast_to(np.asarray(mask) != 0, kernel).reshape(-1, kernel[-1])
    kept = np.asarray(masking.kept_channels(mask, len(kernel)))
    kept = np.broadcast_to(kept, kernel[-1:])
    if kept.any() and not np.all(full[:, kept] == full[:, kept][:, :1]):
        raise UserError(f"{said} keeps parts of channels: expected masks of whole ones, as of system.unit=filter")
    return kept


def distribution(clean: np.ndarray, attacked: np.ndarray) -> dict[str, Any]:
    """Scores (m,) of the clean images and of the attacked ones, as numbers and as densities.

    Returns:
        {"clean" and "attacked": {"mean", "deviation", "least", "most", "values": how many different ones, "counts": the
        images in each bin}, "start" of the first bin, "step"; "common": the area that both densities share, 1 where
        they are the same}.
    """
    bins = [np.floor(scores / STEP).astype(int) for scores in (clean, attacked)]
    first, last = min(of.min() for of in bins), max(of.max() for of in bins)
    counts = [np.bincount(of - first, minlength=last - first + 1) for of in bins]
    told = [{"mean": float(scores.mean()), "deviation": float(scores.std()), "least": float(scores.min()),
             "most": float(scores.max()), "values": len(np.unique(scores)), "counts": of.tolist()}
            for scores, of in zip((clean, attacked), counts)]
    return dict(zip(("clean", "attacked"), told)) | {
        "start": float(first * STEP), "step": STEP,
        "common": float(np.minimum(*(of / of.sum() for of in counts)).sum())}
