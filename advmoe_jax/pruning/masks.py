"""From scores to masks: which units of the kernels are kept.

Legend: kernels (k, k, I, O), linear ones (I, O); n units of a layer. What masks do to parameters is in `ops.masks`.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import shares
from advmoe_jax.core.errors import UserError, one_of, unknown_name
from advmoe_jax.core.layer_spec import LayerSpec

UNITS = ("weight", "kernel", "filter", "column", "block(4,1)", "grouped")
_LEAST = 0.1  # of the target: the share that HARP keeps in every layer


@dataclasses.dataclass(frozen=True)
class _Unit:
    """How a kernel, seen as (k, k, I, O / b, b), falls into units.

    Attributes:
        consecutive: O -> b, filters that are taken together.
        axes: over which the scores of a unit are summed.
        by: axis of what is selected from by itself, as the filter groups of "grouped"; None: the whole layer.
    """

    consecutive: Callable[[int], int]
    axes: tuple[int, ...]
    by: int | None = None


def _unit(text: str) -> _Unit:
    name, numbers = text.partition("(")[0], [int(number) for number in re.findall(r"\d+", text)]
    one = {"weight": (), "kernel": (0, 1), "filter": (0, 1, 2)}
    if text in one:
        return _Unit(lambda filters: 1, one[text])
    if text == "column":
        return _Unit(lambda filters: filters, (4,))
    if name == "block" and text == f"block({','.join(map(str, numbers))})" and numbers[1:] == [1] and numbers[0] > 0:
        return _Unit(lambda filters: numbers[0], (4,))
    if name == "grouped" and text in ("grouped", f"grouped({','.join(map(str, numbers))})") and min(numbers, default=1):
        groups = numbers[0] if numbers else 8
        return _Unit(lambda filters: filters // groups if filters % groups == 0 else filters + 1, (0, 1, 4), by=3)
    raise unknown_name("unit", text, UNITS)


def check_unit(text: str, name: str = "unit") -> None:
    """Raises UserError for a unit that does not exist."""
    try:
        _unit(text)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def with_unit(layers: Iterable[LayerSpec], unit: str) -> tuple[LayerSpec, ...]:
    """The layers that may lose such units: linear ones lose single weights only, since their outputs are the classes.

    Args:
        layers: of a network.
        unit: as of `select`.
    """
    return tuple(spec for spec in layers if unit == "weight" or len(spec.kernel) == 4)


def select(scores: Mapping[str, jax.Array], keep: str | float | Fraction, *, unit: str = "weight",
           scope: str = "layer", norm: str = "l1") -> dict[str, jax.Array]:
    """Keeps the units of the largest scores, exactly n - floor((1 - keep) * n) of n; of equal ones the first.

    Args:
        scores: {path: (k, k, I, O) or (I, O), non-negative}, a number for each weight.
        keep: share that is kept, above 0: 0.1, or text such as "9/16".
        unit: "weight"; "kernel", k x k weights; "filter", an output channel; "column", a weight of all filters at one
            input; "block(4,1)", 4 consecutive filters of a column; "grouped", the kernels of one input channel in a
            group of consecutive filters, of which each group keeps as many: "grouped(8)", 8 groups, unless given.
        scope: "layer", the share of each layer; or "global", of all layers together.
        norm: how the scores of a unit become one: "l1", their sum; "l2", the root of the sum of squares.
    Returns:
        {path: bool mask that broadcasts to the kernel}.
    Raises:
        UserError: an unknown name, a share out of range, a kernel that does not divide into units, scores that are
            negative or NaN.
    """
    share, how = _selection(keep, unit, scope, norm)
    units = {path: _summed(score, how, norm, path, unit) for path, score in scores.items()}
    chosen = _chosen(units, share, scope, how)
    return {path: _spread(chosen[path], score.shape, how) for path, score in scores.items()}


def select_through(scores: Mapping[str, jax.Array], keep: str | float | Fraction | Mapping[str, jax.Array], *,
                   unit: str = "weight", scope: str = "layer") -> dict[str, jax.Array]:
    """The masks of `select` as numbers, with gradients as if each unit's were its score, as `straight_through`.

    Args:
        scores: as of `select`; those of a unit are added.
        keep: as of `select`; or {path: () share of the layer}, which may be traced and gets a gradient.
        unit, scope: as of `select`; where layers have shares of their own, scope is "layer" and unit not "grouped".
    Returns:
        {path: mask, 1 where kept, that broadcasts to the kernel}.
    """
    own = isinstance(keep, Mapping)
    share, how = _selection(1 if own else keep, unit, scope, "l1")
    units = {path: _summed(score, how, "l1", path, unit) for path, score in scores.items()}
    if own:
        through = {path: straight_through(of, keep[path]) for path, of in units.items()}
    else:
        chosen = _chosen(units, share, scope, how)
        through = {path: _as_scores(of, chosen[path]) for path, of in units.items()}
    return {path: _spread(through[path], score.shape, how) for path, score in scores.items()}


def _selection(keep, unit, scope, norm):
    """The share and the unit, once all that `select` takes is checked."""
    share, how = shares.share(keep, "keep"), _unit(unit)
    one_of("scope", scope, ("layer", "global"))
    one_of("norm", norm, ("l1", "l2"))
    if not share:
        raise UserError(f"keep is {keep!r}: expected more than 0")
    if how.by is not None and scope == "global":
        raise UserError(f"scope is 'global': expected 'layer' with unit {unit!r}, whose groups keep equally many")
    return share, how


def _chosen(units, share, scope, how):
    """{path: bool of the shape of the units' scores}."""
    if scope == "layer":
        return {path: _largest(of, share, how.by) for path, of in units.items()}
    flat = jnp.concatenate([of.ravel() for of in units.values()])
    ends = np.cumsum([of.size for of in units.values()])[:-1]
    parts = jnp.split(_largest(flat, share), ends)
    chosen = {path: part.reshape(of.shape) for (path, of), part in zip(units.items(), parts)}
    warn_of_empty(chosen)
    return chosen


def _summed(score, how, norm, path, unit):
    shape = (1, 1, *score.shape) if score.ndim == 2 else score.shape
    together = how.consecutive(shape[-1])
    if len(shape) != 4 or shape[-1] % together:
        raise UserError(f"{path} has a kernel {score.shape}: expected (k, k, I, O) or (I, O) with O that divides into "
                        f"units {unit!r}")
    if not isinstance(score, jax.core.Tracer) and not bool(jnp.all(score >= 0)):
        raise UserError(f"the scores of {path} are negative or NaN: expected numbers of 0 or more")
    seen = jnp.reshape(score, (*shape[:-1], shape[-1] // together, together))
    if norm == "l1":
        return jnp.sum(seen, how.axes, keepdims=True)
    return jnp.sqrt(jnp.sum(jnp.square(seen), how.axes, keepdims=True))


def _largest(scores: jax.Array, keep: Fraction, by: int | None = None) -> jax.Array:
    """Bool of the same shape: the largest; along `by`, so many at each place."""
    rows = scores.reshape(1, -1) if by is None else jnp.moveaxis(scores, by, 0).reshape(scores.shape[by], -1)
    chosen = _largest_of_rows(rows, shares.kept(rows.shape[1], keep))
    if by is None:
        return chosen.reshape(scores.shape)
    rest = tuple(size for axis, size in enumerate(scores.shape) if axis != by)
    return jnp.moveaxis(chosen.reshape(scores.shape[by], *rest), 0, by)


def largest(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Bool of the shape of non-negative scores: the `count` largest, which may be traced; of equal ones the first."""
    return _largest_of_rows(scores.reshape(1, -1), count).reshape(scores.shape)


@jax.jit
def _largest_of_rows(rows: jax.Array, count: int | jax.Array) -> jax.Array:
    """(R, n) bool, the `count` largest of each row, of equal ones the first.

    Of the value and then of the place that divide them one bit after the other is found: sorting takes many times as
    long on CPUs.
    """
    rows = rows if jnp.issubdtype(rows.dtype, jnp.floating) else rows.astype(jnp.float32)
    bits = 8 * rows.dtype.itemsize
    keys = jax.lax.bitcast_convert_type(jnp.abs(rows), f"uint{bits}")  # in their order, as none is negative
    places = jnp.arange(rows.shape[1], dtype=jnp.uint32)[None]

    def largest(bits, kind, holds):
        """Of each row the largest number of so many bits for which (R, 1) -> (R, 1) bool `holds`, as for all below."""
        def add(i, found):
            more = found | jnp.left_shift(jnp.ones((), kind), jnp.asarray(bits - 1 - i, kind))
            return jnp.where(holds(more), more, found)

        return jax.lax.fori_loop(0, bits, add, jnp.zeros((len(rows), 1), kind))

    least = largest(bits, keys.dtype, lambda value: jnp.sum(keys >= value, 1, keepdims=True) >= count)
    above, equal = keys > least, keys == least
    left = count - jnp.sum(above, 1, keepdims=True)
    end = largest(rows.shape[1].bit_length(), places.dtype, lambda place: (
        jnp.sum(equal & (places < place), 1, keepdims=True) <= left))
    return above | (equal & (places < end))


def _spread(chosen, shape, how):
    """(.., .., I, O / b, 1) of units -> a mask that broadcasts to the kernel."""
    mask = jnp.broadcast_to(chosen, (*chosen.shape[:-1], how.consecutive(shape[-1])) if 4 in how.axes else chosen.shape)
    mask = mask.reshape(*mask.shape[:3], -1)
    return mask[0, 0] if len(shape) == 2 else mask


def warn_of_empty(chosen: Mapping[str, jax.Array]) -> None:
    """Warns of the layers, {path: bool}, of which nothing is chosen."""
    empty = [path for path, of in chosen.items() if not isinstance(of, jax.core.Tracer) and not bool(of.any())]
    if empty:
        warnings.warn(f"nothing of {', '.join(empty)} is kept: no signal goes through", stacklevel=4)


def rate(q: jax.Array, target: float) -> jax.Array:
    """The share that a layer keeps, learned through `q`: above a tenth of `target`, below 1.

    HARP (Zhao & Wressnegger, ICLR 2023): least + (1 - least) * sigmoid(q) with least = target / 10.
    """
    least = _LEAST * target
    return least + (1 - least) * jax.nn.sigmoid(q)


def inverse_rate(share: float, target: float) -> float:
    """The q of `rate` for a share, which is held between a little over the least and 0.99."""
    least = _LEAST * target
    inner = (min(max(share, least * (1 + 1e-6)), 0.99) - least) / (1 - least)
    return math.log(inner / (1 - inner))


def budget_loss(q: Mapping[str, jax.Array], sizes: Mapping[str, int], target: float) -> jax.Array:
    """HARP's soft budget: what is kept over what may be, less 1; 0 within the budget.

    Args:
        q: {path: ()} as of `rate`.
        sizes: {path: number of weights}.
        target: share of all weights that may be kept.
    """
    kept = sum(rate(q[path], target) * size for path, size in sizes.items())
    return jax.nn.relu(kept / sum(sizes.values()) / target - 1)


@jax.custom_vjp
def straight_through(scores: jax.Array, keep: jax.Array) -> jax.Array:
    """The mask of the largest scores as numbers, 1 where kept, with gradients as if it were the scores themselves.

    HYDRA's (Sehwag et al., NeurIPS 2020) with HARP's gradient of the share: the sum of that of the mask.

    Args:
        scores: of any shape, non-negative.
        keep: () share of them that is kept; may be traced.
    """
    count = scores.size
    removed = jnp.floor((1 - keep) * count + count * 2.0**-22)  # whole numbers come out of float32 a little below
    return _largest_of_rows(scores.reshape(1, -1), count - removed).reshape(scores.shape).astype(scores.dtype)


straight_through.defvjp(
    lambda scores, keep: (straight_through(scores, keep), None), lambda _, slope: (slope, jnp.sum(slope)))


@jax.custom_vjp
def _as_scores(scores, chosen):
    """What is chosen as numbers, with the gradient of the scores."""
    return chosen.astype(scores.dtype)


_as_scores.defvjp(lambda scores, chosen: (_as_scores(scores, chosen), None), lambda _, slope: (slope, None))
