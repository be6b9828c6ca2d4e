"""Plans: which images an expert computes together.

A routed layer computes in blocks of T images that all take one expert. Each expert has as many blocks as its images
need, the last one filled up; no image is ever left out, whatever the load. Tokens are planned as images are.

B batch, E experts, T images in a block, n blocks, D devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_FEW = 1024  # images that are planned by comparing each with each


class Plan(NamedTuple):
    """A permutation of a batch into blocks. Made by `make`.

    Attributes:
        image: (n, T) int32, the image in each place; B for a filler.
        place: (B,) int32, where each image is among the n T places.
        expert: (n,) int32, of each block.
        ends: (E,) int32, the block behind the last one of each expert.
    """

    image: jax.Array
    place: jax.Array
    expert: jax.Array
    ends: jax.Array

    @property
    def used(self) -> jax.Array:
        """(n,) bool, whether a block holds any image."""
        return jnp.arange(self.expert.shape[0]) < self.ends[-1]


def rows(plan: Plan) -> jax.Array:
    """(n, T) rows of the batch that blocks read; a filler reads the last one."""
    return jnp.minimum(plan.image, plan.place.shape[0] - 1)


def in_order(found: jax.Array, plan: Plan) -> jax.Array:
    """(B, ...) in the order of the batch, of (n, T, ...) for all places: fillers are left out."""
    return found.reshape(-1, *found.shape[2:])[plan.place]


@functools.partial(jax.jit, static_argnames=("num_experts", "size"))
def make(ids: jax.Array, num_experts: int, size: int) -> Plan:
    """Plans a batch in floor((B + E (T - 1)) / T) blocks, which hold any load.

    Args:
        ids: (B,) the expert of each image.
        num_experts: E.
        size: T.
    """
    # By comparisons: XLA on CPU makes loops and dozens of kernels of scatters and cumulative sums.
    batch = ids.shape[0]
    few = batch <= _FEW
    images, experts = (jnp.arange(count, dtype=jnp.int32) for count in (batch, num_experts))
    places = jnp.arange((batch + num_experts * (size - 1)) // size * size, dtype=jnp.int32)
    mine = ids[:, None] == experts[None]
    blocks = -(-_count(mine.T) // size)
    ends = _count(experts[:, None] >= experts[None], blocks)
    rank = (_count((ids[:, None] == ids[None]) & (images[:, None] > images[None])) if few else
            _count(mine, jnp.cumsum(mine, 0, dtype=jnp.int32)) - 1)
    place = rank + size * _count(mine, ends - blocks)
    image = (jnp.min(jnp.where(places[:, None] == place[None], images[None], batch), 1) if few else
             jnp.full_like(places, batch).at[place].set(images))
    expert = jnp.minimum(_count(places[::size, None] >= size * ends[None]), num_experts - 1)
    return Plan(image.reshape(-1, size), place, expert, ends)


def _count(which, of=1):
    """(n,) how many of m items, each counting `of`, which (n, m) picks."""
    return jnp.sum(jnp.where(which, of, 0), 1, dtype=jnp.int32)
