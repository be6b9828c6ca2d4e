"""Splitting a set of labelled images so that every class keeps its share."""

import numpy as np


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Draws `count` examples, the same ones every time, each class in proportion to its size.

    Shares are rounded by largest remainder, ties to the lower label: exact to one example.

    Args:
        labels: (n,) integers.
        count: how many to draw, 0..n.
    Returns:
        (count,) int64 indices into `labels`, sorted.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    shares, remainders = np.divmod(count * sizes, max(len(labels), 1))
    shares[np.argsort(-remainders, kind="stable")[: count - shares.sum()]] += 1
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(np.flatnonzero(labels == label))[:share]
             for label, share in zip(classes, shares)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)
