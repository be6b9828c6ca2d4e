"""What a routed network says of its routing: in a training step, on the progress line, in an evaluation.

B batch, L routed layers, T tokens for each of which an image chooses in a layer, E experts, m images.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import tables
from advmoe_jax.core.tables import Table
from advmoe_jax.ops import routing

_ENOUGH = 16  # images, for a load to say something
_COLLAPSED = 0.1  # entropy of the load, mean over iterations; of two experts one then gets over 98 % of the images
_NOTE = ("Load: share of the clean test images that each expert gets. Entropy: of the load, 1 is even and 0 is one "
         "expert for all. Flips: share of the images whose expert changes under the gradient that breaks most of them. "
         "Where tokens choose, they count in place of images.")


def metrics(passes: Mapping[str, tuple[jax.Array, dict[str, jax.Array]]], num_experts: int, tokens: int = 1
            ) -> dict[str, jax.Array]:
    """Load (L, E) and its entropy (L,) of the first pass; where there are two, the rate of flips (L,) between them."""
    ids = [routing.by_layer(aux["expert_ids"], tokens) for _, aux in passes.values()]
    counts = routing.load(ids[0], num_experts)
    found = {"load": counts / ids[0].shape[0], "load_entropy": routing.load_entropy(counts)}
    return found | ({"flip_rate": jnp.mean(ids[0] != ids[1], axis=0)} if len(ids) > 1 else {})


def progress(means: Mapping[str, Any]) -> str:
    """"expert load 38-62 %, flips 9 %": over all layers, the least and the largest load, and the mean of the flips."""
    load = 100 * np.asarray(means["load"])
    words = f"expert load {load.min():.0f}-{load.max():.0f} %"
    return words + (f", flips {100 * np.mean(means['flip_rate']):.0f} %" if "flip_rate" in means else "")


def watch(means: Mapping[str, Any], batch_size: int, iterations: int) -> tuple[str, ...]:
    """A sentence if one expert gets nearly all images in some layers, in every iteration its own perhaps.

    Few images always share an expert: small batches are looked at together, and of batches of one, which BatchNorm
    makes all alike, nothing is said.
    """
    if batch_size == 1 or batch_size * iterations < _ENOUGH:
        return ()
    entropy = np.asarray(means["load_entropy"] if batch_size >= _ENOUGH else routing.load_entropy(means["load"]))
    layers = np.flatnonzero(entropy < _COLLAPSED)
    if not len(layers):
        return ()
    return (f"one expert gets nearly all images in {len(layers)} of {len(entropy)} layers "
            f"({', '.join(map(str, layers))}): lower optim.router.learning_rate, or set system.balance_loss=0.01",)


def facts(clean: np.ndarray, attacked: np.ndarray, among: np.ndarray, num_experts: int, tokens: int = 1
          ) -> dict[str, Any]:
    """Load (L, E), its entropy (L,) and the rate of flips (L,) on test images.

    Args:
        clean, attacked: (m, L * T) experts of the clean images and under the attack that breaks most of them.
        among: (m,) bool, the images that were attacked.
        num_experts: E.
        tokens: T.
    """
    clean, attacked = (routing.by_layer(ids, tokens) for ids in (clean, attacked))
    among = np.repeat(among, tokens)
    counts = np.asarray(routing.load(jnp.asarray(clean), num_experts))
    flips = (clean != attacked)[among].mean(0) if among.any() else np.zeros(clean.shape[1])
    return {"load": (counts / len(clean)).tolist(), "load_entropy": np.asarray(routing.load_entropy(counts)).tolist(),
            "flip_rate": flips.tolist()}


def fact_table(found: Mapping[str, Any]) -> Table:
    """`facts` with a row for each routed layer."""
    rows = [(str(layer), " / ".join(map(tables.percent, shares)), tables.decimals(entropy), tables.percent(flips))
            for layer, (shares, entropy, flips) in enumerate(
                zip(found["load"], found["load_entropy"], found["flip_rate"]))]
    return Table("Routing", ("layer", "load %", "entropy", "flips %"), rows, (_NOTE,), varying=("flips %",))
