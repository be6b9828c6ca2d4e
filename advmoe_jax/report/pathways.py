"""Statistics of the pathways that images take, and of what breaks them: router or predictor.

Zhang et al., ICCV 2023, section 4 (figures 4 and 5) and section 5. m images, L routed choices, E experts, K classes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from advmoe_jax.ops import routing

CATEGORIES = ("neither", "router", "pathway", "both")
"""What an attack has broken, in the paper's order (1) to (4)."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a routed network makes of images.

    Attributes:
        labels: (m,) that it predicts.
        experts: (m, L) that it takes.
    """

    labels: np.ndarray
    experts: np.ndarray


def broken(y: np.ndarray, clean: Answers, attacked: Answers) -> tuple[np.ndarray, np.ndarray]:
    """(m,) bool each: whether the predictor is broken, and whether any layer takes another expert than before.

    An image that is misclassified when clean counts as broken, so that what is left is RA.
    """
    return (clean.labels != y) | (attacked.labels != y), np.any(attacked.experts != clean.experts, 1)


def worst(y: np.ndarray, clean: Answers, attacked: Sequence[Answers]) -> np.ndarray:
    """(m,) which of several attacks counts for each image: the first that breaks the predictor and the router, else the
    predictor, else the router; 0 where none breaks anything."""
    harm = [2 * predictor + router for predictor, router in (broken(y, clean, of) for of in attacked)]
    return np.argmax(harm, 0)


def dissection(y: np.ndarray, clean: Answers, attacked: Answers) -> dict[str, Any]:
    """How many images an attack broke in which part.

    Returns:
        {"neither", "router", "pathway", "both": images, m together; "ra" and "router_robust": shares, of "neither" and
        "router", and of "neither" and "pathway"; "flip_rate": (L,) share of the images that take another expert}.
    """
    predictor, router = broken(y, clean, attacked)
    counts = np.bincount(router + 2 * predictor, minlength=4)
    return dict(zip(CATEGORIES, counts.tolist())) | {
        "ra": float(np.mean(~predictor)), "router_robust": float(np.mean(~router)),
        "flip_rate": np.mean(attacked.experts != clean.experts, 0).tolist()}


def statistics(experts: np.ndarray, y: np.ndarray, num_experts: int, num_classes: int) -> dict[str, Any]:
    """Who takes what.

    Args:
        experts: (m, L).
        y: (m,) labels.
        num_experts, num_classes: E, K.
    Returns:
        {"load": (L, E) shares; "load_entropy": (L,), 1 is even; "distinct": pathways that some image takes, of
        "possible" E^L; "effective": 2 to the entropy of the pathways in bits: as many equally frequent ones have the
        same; "common": (L,) the most frequent pathway, of equal ones the first by its experts, and "common_share" of
        the images; "by_class": (K, L, E) shares of the images of a class, 0 for a class without images}.
    """
    counts = np.asarray(routing.load(jnp.asarray(experts), num_experts))
    taken, images = np.unique(experts, axis=0, return_counts=True)
    shares = images / len(experts)
    by_class = np.zeros((num_classes, *counts.shape))
    np.add.at(by_class, (y[:, None], np.arange(experts.shape[1])[None], experts), 1)
    sizes = np.maximum(np.bincount(y, minlength=num_classes), 1)[:, None, None]
    return {"load": (counts / len(experts)).tolist(), "load_entropy": np.asarray(routing.load_entropy(counts)).tolist(),
            "distinct": len(taken), "possible": num_experts ** experts.shape[1],
            "effective": float(2 ** -np.sum(shares * np.log2(shares))), "common": taken[np.argmax(images)].tolist(),
            "common_share": float(shares.max()), "by_class": (by_class / sizes).tolist()}
