"""Runs iterative attacks: unrolled or looped inside a traced program, chunk by chunk outside one.

Loop or single steps? On CPU, a loop over convolutions is fast in one layout only (NHWC images, HWIO kernels); in any
other one XLA runs it many times slower than the same compiled step, called again and again. An accelerator would idle
between such calls, so it always loops.

Outside a traced program, rows that are done leave the batch after each chunk of steps. The smaller batch has one of a
few sizes, since each size compiles, and is filled up with padding. B rows of a batch.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from advmoe_jax.core import mesh as meshes
from advmoe_jax.core import stop
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import one_of

DRIVERS = ("auto", "unroll", "device", "host")
_MAX_UNROLLED = 5
_SMALLEST_BATCH = 8  # rows on each device
_SMALLER_BATCHES = 5  # sizes below the full one, at most; each compiles
_CHUNK = 10  # steps between two looks at which rows are done
_FAST_IN_LOOPS = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # of convolutions on CPU: NHWC, HWIO, NHWC

Carry = Any
"""What a program hands from step to step: a pytree of arrays with leading B."""


class Inputs(NamedTuple):
    """What an attack reads and never changes.

    Attributes:
        logits_fn: `jax.tree_util.Partial` of the model.
        rows: pytree of arrays with leading B: images, labels, keys, targets.
        scalars: pytree of numbers that all rows share: eps, step sizes. Other values compile nothing.
    """

    logits_fn: jax.tree_util.Partial
    rows: Any
    scalars: Any


class Program(Protocol):
    """An iterative attack. Hashable and equal by configuration, so that compiled programs are shared.

    Only `step` calls the model. Each row is treated alone.

    Attributes:
        stops: whether rows that are `done` stay as they are in further steps, so that they may leave the batch.
        cost: forward and backward passes of a step.
    """

    stops: bool
    cost: tuple[int, int]

    def start(self, inputs: Inputs) -> Carry:
        """The first carry."""

    def step(self, inputs: Inputs, carry: Carry, i: jax.Array) -> Carry:
        """The next carry."""

    def done(self, carry: Carry) -> jax.Array:
        """(B,) bool: rows whose result can no longer change in a way that counts."""

    def finish(self, inputs: Inputs, carry: Carry) -> dict[str, jax.Array]:
        """The result: a candidate, see `none_yet`, and other arrays with leading B."""


@dataclasses.dataclass
class Ledger:
    """Passes of rows through the model.

    `forward` and `backward` count the rows that needed a pass; `executed_*` count all rows of the batch, padding too.
    """

    forward: int = 0
    backward: int = 0
    executed_forward: int = 0
    executed_backward: int = 0

    def add(self, cost: tuple[int, int], steps: int, needed: int, executed: int) -> None:
        """Counts `steps` steps of a batch."""
        self.forward += cost[0] * steps * needed
        self.backward += cost[1] * steps * needed
        self.executed_forward += cost[0] * steps * executed
        self.executed_backward += cost[1] * steps * executed


_ledger: contextvars.ContextVar[Ledger | None] = contextvars.ContextVar("ledger", default=None)
_rows: contextvars.ContextVar["_Rows | None"] = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def counted() -> Iterator[Ledger]:
    """Counts the passes of the attacks inside this context; those inside a traced program are not seen."""
    ledger = Ledger()
    token = _ledger.set(ledger)
    try:
        yield ledger
    finally:
        _ledger.reset(token)


class _Rows(NamedTuple):
    """The first `real` rows of a batch are images, the rest is padding. `needed` of them are counted as needed. Smaller
    batches have the sizes that `bucket` gives for `full`."""

    real: int
    full: int
    needed: int


@contextlib.contextmanager
def real_rows(count: int, full: int, needed: int | None = None) -> Iterator[None]:
    """Inside this context, a batch has `count` rows of images; the rows after them are padding.

    Padding is not counted as needed, and no attack waits for it.

    Args:
        count: rows of images, which come first.
        full: the batch size from which `bucket` makes the smaller ones.
        needed: how many of the rows a ledger counts as needed; all unless given.
    """
    token = _rows.set(_Rows(count, full, count if needed is None else needed))
    try:
        yield
    finally:
        _rows.reset(token)


def count(cost: tuple[int, int], rows: int) -> None:
    """Counts one pass outside of a program, such as the one over clean images."""
    if ledger := _ledger.get():
        ledger.add(cost, 1, _rows_of(rows).real, rows)


def _rows_of(size):
    real, full, needed = _rows.get() or (size, size, size)
    return _Rows(min(real, size), full, min(needed, size))


def _advance(program, inputs, carry, i):
    """One step. Rows that are done stay as they are, so that their result is the same whenever they leave the batch."""
    stepped = program.step(inputs, carry, i)
    return select(program.done(carry), carry, stepped) if program.stops else stepped


def _loop(program, inputs, carry, first, end):
    def continues(state):
        i, carry = state
        return (i < end) & ~jnp.all(program.done(carry)) if program.stops else i < end

    return jax.lax.while_loop(continues, lambda s: (s[0] + 1, _advance(program, inputs, s[1], s[0])),
                              (jnp.asarray(first, jnp.int32), carry))[1]


_jit = functools.partial(jax.jit, static_argnames=("program",))
_step = _jit(_advance, donate_argnames=("carry",))
_steps = _jit(_loop, donate_argnames=("carry",))
_done = _jit(lambda program, carry: program.done(carry))
_finish = _jit(lambda program, inputs, carry: program.finish(inputs, carry))


@_jit
def _start(program, inputs):
    # The carry is donated later on: it must own its buffers.
    return jax.tree.map(jnp.array, program.start(inputs))


def _is_fast_in_loops(program, inputs, carry):
    """Whether a loop over steps is fast: on CPU, if all convolutions have images in NHWC and kernels in HWIO."""
    if jax.default_backend() != "cpu":
        return True
    steps = _steps.trace(program, inputs, carry, np.int32(0), np.int32(0)).jaxpr
    return all(tuple(equation.params["dimension_numbers"]) == _FAST_IN_LOOPS for equation in equations(steps.jaxpr)
               if equation.primitive is jax.lax.conv_general_dilated_p)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a traced program, with those of the programs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def run(program: Program, inputs: Inputs, num_steps: int, driver: str = "auto") -> Any:
    """Starts, steps `num_steps` times and finishes an attack.

    Args:
        program: what to run.
        inputs: arrays or tracers.
        num_steps: static number of steps.
        driver: "unroll" traces every step, "device" a loop over steps; "host" compiles one step and calls it. "auto" is
            "device" where loops are fast (see above). Elsewhere it is "host"; inside a traced program "unroll" up to 5
            steps and "device" for more.
    """
    inputs = _as_jax(inputs)
    traced = trees.is_traced(inputs)
    carry = _start(program, inputs)
    if one_of("driver", driver, DRIVERS) == "auto":
        is_loop = num_steps > 1 and (
            traced and num_steps > _MAX_UNROLLED or _is_fast_in_loops(program, inputs, carry))
        driver = "device" if is_loop else "unroll" if traced else "host"
    if traced and driver == "device":  # the compiled function, which `_is_fast_in_loops` may have traced already
        carry = _steps(program, inputs, carry, np.int32(0), np.int32(num_steps))
    elif traced or driver == "unroll":
        for i in range(num_steps):
            carry = _advance(program, inputs, carry, i)
    else:
        carry = _run_in_chunks(program, inputs, carry, num_steps, on_host=driver == "host")
    return _finish(program, inputs, carry)


def _run_in_chunks(program, inputs, carry, num_steps, on_host):
    """The last carry of all rows. After each chunk of steps, rows that are done may leave the batch."""
    whole = carry
    size = batch = _size(inputs.rows)
    origin = np.arange(size)  # the row of `whole` that each row of `carry` came from; `size` for padding
    real, full, needed = _rows_of(size)
    rows, i = inputs.rows, 0
    while i < num_steps:
        end = min(i + _CHUNK, num_steps) if program.stops else num_steps
        if ledger := _ledger.get():
            ledger.add(program.cost, end - i, needed, batch)
        batch_inputs = inputs._replace(rows=rows)
        stop.check()
        if on_host:
            for step in range(i, end):
                stop.check()
                carry = _step(program, batch_inputs, carry, np.int32(step))
        else:
            carry = _steps(program, batch_inputs, carry, np.int32(i), np.int32(end))
        i = end
        if not program.stops or i == num_steps:
            continue
        active = np.flatnonzero(~meshes.fetch(_done(program, carry)) & (origin < real))
        if len(active) == 0:
            break
        needed = min(needed, len(active))
        if (smaller := bucket(len(active), full, _devices(rows))) < batch:
            whole = carry if batch == size else scatter(whole, carry, origin)
            chosen = filled(active, smaller)
            carry, rows = gather(carry, chosen), gather(rows, chosen)
            origin = np.where(np.arange(smaller) < len(active), origin[chosen], size)
            batch = smaller
    return carry if batch == size else scatter(whole, carry, origin)


def none_yet(x: jax.Array, broken: jax.Array | None = None) -> dict[str, jax.Array]:
    """The candidate {"x", "loss", "broken"} of clean images: every other candidate is worse, and replaces it.

    Where `broken` (B,) says that the clean image is misclassified, it is final: nothing replaces it.
    """
    broken = jnp.zeros(x.shape[0], bool) if broken is None else broken
    return dict(x=x, loss=jnp.where(broken, jnp.inf, -jnp.inf).astype(x.dtype), broken=broken)


def rounds(one: Callable[[Inputs, int], dict[str, jax.Array]], inputs: Inputs, worst: dict[str, jax.Array],
           num_rounds: int, stops: bool) -> dict[str, jax.Array]:
    """The worst candidate of several rounds: restarts, targets, members.

    Args:
        one: `(inputs, number of the round) -> candidate`.
        inputs: of all rows.
        worst: the candidate before the first round.
        num_rounds: how many.
        stops: whether a broken row keeps its candidate; outside a traced program it leaves the batch.
    """
    inputs = _as_jax(inputs)
    size = _size(inputs.rows)
    real, full, _ = _rows_of(size)
    for number in range(num_rounds):
        if not stops:
            worst = worse(worst, one(inputs, number))
            continue
        if trees.is_traced((inputs, worst)):
            worst = select(worst["broken"], worst, worse(worst, one(inputs, number)))
            continue
        active = np.flatnonzero(~meshes.fetch(worst["broken"])[:real])
        if len(active) == 0:
            break
        if (batch := bucket(len(active), full, _devices(inputs.rows))) >= size:
            with real_rows(real, full, len(active)):
                worst = _worse(worst, one(inputs, number))
            continue
        chosen = filled(active, batch)
        with real_rows(len(active), full):
            candidate = one(inputs._replace(rows=gather(inputs.rows, chosen)), number)
        origin = np.where(np.arange(batch) < len(active), chosen, size)
        worst = scatter(worst, _worse(gather(worst, chosen), candidate), origin)
    return worst


def worse(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Per row the worse candidate: the broken one, or that of higher loss; `a` if equal, or if a loss is NaN."""
    b_is_worse = (b["broken"] & ~a["broken"]) | ((b["broken"] == a["broken"]) & (b["loss"] > a["loss"]))
    return select(b_is_worse, b, a)


_worse = jax.jit(worse)


def select(condition: jax.Array, a: Any, b: Any) -> Any:
    """Per row `a` where the condition (B,) holds, else `b`; pytrees of arrays with leading B."""
    return jax.tree.map(lambda u, v: jnp.where(condition.reshape(-1, *[1] * (u.ndim - 1)), u, v), a, b)


def bucket(count: int, full: int, devices: int = 1) -> int:
    """The size of the batch for `count` rows: the smallest of up to six sizes that holds them.

    The sizes go down from `full` to 8 rows a device in equal ratios of 1.6 or more.
    """
    least = min(full, _SMALLEST_BATCH * devices)
    smaller = min(_SMALLER_BATCHES, int(math.log(full / least, 1.6)))
    sizes = (-(-round(full * (least / full) ** (n / max(smaller, 1))) // devices) * devices
             for n in range(smaller, -1, -1))
    return next(size for size in sizes if size >= min(count, full))


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Row numbers, followed by padding up to `size`: the first row, again and again."""
    return np.concatenate([rows, np.full(size - len(rows), rows[0])])


def gather(tree: Any, rows: np.ndarray) -> Any:
    """Rows of every array of a pytree, laid out on the devices as the array was."""
    return jax.tree.map(_laid_out_as, tree, _gather(tree, rows))


def scatter(tree: Any, part: Any, rows: np.ndarray) -> Any:
    """`tree` with the rows of `part` written to `rows`; numbers out of range (padding) are dropped."""
    return jax.tree.map(_laid_out_as, tree, _scatter(tree, part, rows))


def _laid_out_as(leaf, new):
    """`new`, laid out on the devices as `leaf` is; an array on one device may stay where it is."""
    return jax.device_put(new, leaf.sharding) if len(leaf.sharding.device_set) > 1 else new


_gather = jax.jit(lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree))
_scatter = jax.jit(lambda tree, part, rows: jax.tree.map(
    lambda leaf, new: leaf.at[rows].set(new, mode="drop"), tree, part))


def _as_jax(inputs: Inputs) -> Inputs:
    return inputs._replace(rows=jax.tree.map(jnp.asarray, inputs.rows))


def _size(rows) -> int:
    return jax.tree.leaves(rows)[0].shape[0]


def _devices(rows) -> int:
    return max(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(rows))
