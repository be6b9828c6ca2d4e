"""One look at everything that is usually wrong with what an attack is given.

x images (B, H, W, C), y labels (B,), K classes. Inside a traced program only shapes and types can be seen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import objectives
from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import UserError
from advmoe_jax.ops import routing

_ROUNDING = 1e-5  # by which images that were normalised and are back may leave [0, 1]


def images(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Images as attacks take them: floats of 32 bits or more; those that rounding has moved out of [0, 1] are clipped.

    Raises:
        UserError: they are no floats (B, H, W, C) in [0, 1].
    """
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    if x.ndim != 4 or 0 in x.shape:
        raise UserError(f"x has shape {x.shape}: expected (B, H, W, C), B at least 1")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"x is of type {x.dtype}: expected floats in [0, 1], such as x / 255")
    x = x if jnp.finfo(x.dtype).bits >= 32 else x.astype(np.float32)
    is_inside = (_inside_jitted if isinstance(x, jax.Array) else _inside)(x)
    if trees.is_traced(is_inside):
        return x
    if not is_inside:
        x = meshes.fetch(x)
        found = (f"values from {x.min():.9g} to {x.max():.9g}" if np.all(np.isfinite(x)) else
                 "values that are NaN or infinite")
        raise UserError(f"x has {found}: expected [0, 1]; normalisation belongs into logits_fn")
    return x.clip(0, 1)


def _inside(x):
    return ((x >= -_ROUNDING) & (x <= 1 + _ROUNDING)).all()


_inside_jitted = jax.jit(_inside)


def classes(takes: str, model_fn: jax.tree_util.Partial, x: jax.Array, *keys: jax.Array) -> int:
    """K of a model.

    Args:
        takes: what it is, see About.
        model_fn: of `objectives.partial`.
        x, keys: what it is called with, beside a route if it takes one.
    Raises:
        UserError: it cannot be traced, or gives no logits.
    """
    more = (routing.hard(),) if takes == "routed" else keys
    with objectives.tracing(*keys):
        logits = jax.eval_shape(_call, model_fn, x, *more)
        logits = logits[0] if takes in ("outputs", "routed", "gated") else logits
    shape, dtype = getattr(logits, "shape", ()), getattr(logits, "dtype", None)
    if len(shape) != 2 or shape[0] != len(x) or shape[1] < 2 or not jnp.issubdtype(dtype, jnp.floating):
        found = f"{dtype} of shape {shape}" if dtype else type(logits).__name__
        raise UserError(f"logits_fn gives {found} for {len(x)} images: expected ({len(x)}, K) logits, floats, K at "
                        "least 2")
    return shape[1]


def _call(model_fn, *inputs):
    return model_fn(*inputs)


def labels(y: Any, size: int, num_classes: int) -> Any:
    """Labels of `size` images, of jax's type of whole numbers.

    Raises:
        UserError: they are no whole numbers (B,) below num_classes.
    """
    y = y if isinstance(y, jax.Array) else np.asarray(y)
    if y.shape != (size,) or not jnp.issubdtype(y.dtype, jnp.integer):
        one_hot = ", such as y.argmax(-1) of one-hot labels" if y.shape == (size, num_classes) else ""
        raise UserError(f"y is of type {y.dtype} and shape {y.shape}: expected whole numbers of shape ({size},)"
                        f"{one_hot}")
    if not trees.is_traced(y):
        low, high = (int(bound) for bound in (meshes.fetch(y).min(), meshes.fetch(y).max()))
        if low < 0 or high >= num_classes:
            raise UserError(f"y has labels from {low} to {high}: expected 0 to {num_classes - 1}")
    return y.astype(jax.dtypes.canonicalize_dtype(int))
