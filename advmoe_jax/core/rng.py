"""Randomness: a key is a function of (seed, stream, step); nothing random is ever stored."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core.errors import UserError


def typed(key: jax.Array, rows: int | None = None) -> jax.Array:
    """A key as jax.random.key makes it, of such a key or of one of jax.random.PRNGKey; or keys (rows,).

    Raises:
        UserError: it is neither, or there are as many as are not wanted.
    """
    dtype = getattr(key, "dtype", np.dtype(object))
    try:
        if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key if dtype == np.uint32 else None)
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"key is {key!r}: expected jax.random.key(0), or jax.random.PRNGKey(0)") from None
    if key.shape not in ((), (rows,)):
        several = "" if rows is None else f", or one for each of the {rows} images"
        raise UserError(f"key has shape {key.shape}: expected one key{several}")
    return key


def number(name: str) -> np.int32:
    """A stream's name as what `stream` and `key` take for it too: one program then serves several streams."""
    return np.int32(zlib.crc32(name.encode()) & 0x7FFFFFFF)


def stream(key: jax.Array, name: str | jax.Array) -> jax.Array:
    """The key of a named stream ("params", "augment", "attack") below `key`."""
    return jax.random.fold_in(key, number(name) if isinstance(name, str) else name)


def key(seed: int, name: str | jax.Array, step: int | jax.Array = 0) -> jax.Array:
    """The key of a named stream at a step. Works inside and outside jit."""
    return jax.random.fold_in(stream(jax.random.key(seed), name), step)


def on_host(seed: int, name: str, *counts: int) -> np.random.Generator:
    """What draws on the host of a named stream, for numbers such as a step and a row."""
    words = (seed % 2**64, zlib.crc32(name.encode()), *counts)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def per_example(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key per example, folded from its index in the data set.

    What an example sees then does not depend on the batch it comes in, nor on the devices.

    Args:
        key: one key.
        index: (B,) int32 indices in the data set.
    Returns:
        (B,) keys.
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def rowwise(key: jax.Array, rows: int) -> jax.Array:
    """Keys (rows,): those given, or folded from one key and the row's number; of either kind, see `typed`."""
    key = typed(key, rows)
    return per_example(key, jnp.arange(rows)) if key.ndim == 0 else key


def fold_in(keys: jax.Array, i: int | jax.Array) -> jax.Array:
    """Folds a number, such as a restart or an iteration, into keys (B,)."""
    return jax.vmap(lambda k: jax.random.fold_in(k, i))(keys)
