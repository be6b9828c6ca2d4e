"""Runs iterative attacks: unrolled or looped inside a traced program, chunk by chunk outside one.

XLA on CPU runs a loop over convolutions of any layout but one many times slower than the same compiled step called
again and again; over that layout it runs faster, and an accelerator would idle between such calls. Outside a traced
program the rows that an attack is through with are left out of what follows, in batches of a few sizes.
B rows of a batch.
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
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import one_of

DRIVERS = ("auto", "unroll", "device", "host")
_MAX_UNROLLED = 5
_SMALLEST_BATCH = 8  # rows on each device
_SMALLER = 5  # most sizes of batches below the full one, each of which compiles
_CHUNK = 10  # steps between two looks at what is finished
_QUICK_IN_LOOPS = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # of convolutions on CPU: NHWC, HWIO, NHWC


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
        stops: whether rows that are `done` may be left out of further steps.
        cost: forward and backward passes of a step.
    """

    stops: bool
    cost: tuple[int, int]

    def start(self, inputs: Inputs) -> Any:
        """The first carry, a pytree of arrays with leading B."""

    def step(self, inputs: Inputs, carry: Any, i: jax.Array) -> Any:
        """The next carry."""

    def done(self, carry: Any) -> jax.Array:
        """(B,) bool: rows on which further steps change nothing that counts."""

    def finish(self, inputs: Inputs, carry: Any) -> Any:
        """The result, a pytree of arrays with leading B."""


@dataclasses.dataclass
class Ledger:
    """Passes of rows through the model: `forward` and `backward` of rows that needed them, `executed_*` of all."""

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
    """Counts what attacks do to the model while it is open; what runs inside a traced program is not seen."""
    ledger = Ledger()
    token = _ledger.set(ledger)
    try:
        yield ledger
    finally:
        _ledger.reset(token)


class _Rows(NamedTuple):
    """Of a batch: the first `real` rows are no fillers, `needed` of them count, `full` is the batch of the sizes."""

    real: int
    full: int
    needed: int


@contextlib.contextmanager
def real_rows(count: int, full: int, needed: int | None = None) -> Iterator[None]:
    """Says that the rows from `count` on are fillers while it is open: they are neither counted nor waited for.

    The sizes in which rows go on are those of a batch of `full`. `needed` says how many rows count, where not all do.
    """
    token = _rows.set(_Rows(count, full, count if needed is None else needed))
    try:
        yield
    finally:
        _rows.reset(token)


def count(cost: tuple[int, int], rows: int) -> None:
    """Counts one pass that no program makes, such as the clean one."""
    if ledger := _ledger.get():
        ledger.add(cost, 1, _rows_of(rows).real, rows)


def _rows_of(size):
    real, full, needed = _rows.get() or (size, size, size)
    return _Rows(min(real, size), full, min(needed, size))


@functools.partial(jax.jit, static_argnames=("program",))
def _start(program, inputs):
    # The carry is donated later on: it must own its buffers.
    return jax.tree.map(jnp.array, program.start(inputs))


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("carry",))
def _step(program, inputs, carry, i):
    return _advance(program, inputs, carry, i)


@functools.partial(jax.jit, static_argnames=("program",), donate_argnames=("carry",))
def _steps(program, inputs, carry, first, end):
    return _loop(program, inputs, carry, first, end)


@functools.partial(jax.jit, static_argnames=("program",))
def _done(program, carry):
    return program.done(carry)


@functools.partial(jax.jit, static_argnames=("program",))
def _finish(program, inputs, carry):
    return program.finish(inputs, carry)


def _advance(program, inputs, carry, i):
    """A step that leaves rows alone that are done, so that it does not matter when they are left out."""
    moved = program.step(inputs, carry, i)
    return select(program.done(carry), carry, moved) if program.stops else moved


def _loop(program, inputs, carry, first, end):
    def goes_on(state):
        i, carry = state
        return (i < end) & ~jnp.all(program.done(carry)) if program.stops else i < end

    return jax.lax.while_loop(goes_on, lambda s: (s[0] + 1, _advance(program, inputs, s[1], s[0])),
                              (jnp.asarray(first, jnp.int32), carry))[1]


def _loops_well(program, inputs, carry):
    """Whether a loop over steps is quick: on CPU all convolutions have images in NHWC and kernels in HWIO."""
    if jax.default_backend() != "cpu":
        return True
    steps = _steps.trace(program, inputs, carry, np.int32(0), np.int32(0)).jaxpr
    return all(tuple(equation.params["dimension_numbers"]) == _QUICK_IN_LOOPS for equation in equations(steps.jaxpr)
               if equation.primitive is jax.lax.conv_general_dilated_p)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a traced program, those inside of others too."""
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
        driver: "unroll" and "device" trace the whole attack, "host" compiles one step. "auto" loops on the device,
            unless that is a CPU and a convolution of the step, such as the gradient of one that autodiff made, is slow
            in loops there: then the host steps, and inside a traced program up to 5 steps are unrolled.
    """
    inputs = _as_jax(inputs)
    traced = trees.is_traced(inputs)
    carry = _start(program, inputs)
    if one_of("driver", driver, DRIVERS) == "auto":
        loops = num_steps > 1 and (traced and num_steps > _MAX_UNROLLED or _loops_well(program, inputs, carry))
        driver = "device" if loops else "unroll" if traced else "host"
    if traced and driver == "device":  # the compiled function, which `_loops_well` may have traced already
        carry = _steps(program, inputs, carry, np.int32(0), np.int32(num_steps))
    elif traced or driver == "unroll":
        for i in range(num_steps):
            carry = _advance(program, inputs, carry, i)
    else:
        carry = _run_in_chunks(program, inputs, carry, num_steps, on_host=driver == "host")
    return _finish(program, inputs, carry)


def _run_in_chunks(program, inputs, carry, num_steps, on_host):
    """The last carry of all rows; after each chunk the rows that are done may be left out."""
    whole = carry
    size = batch = _size(inputs.rows)
    where = np.arange(size)  # the row of `whole` that each row of `carry` is, or `size` for a filler
    real, full, needed = _rows_of(size)
    rows, i = inputs.rows, 0
    while i < num_steps:
        end = min(i + _CHUNK, num_steps) if program.stops else num_steps
        if ledger := _ledger.get():
            ledger.add(program.cost, end - i, needed, batch)
        now = inputs._replace(rows=rows)
        if on_host:
            for step in range(i, end):
                carry = _step(program, now, carry, np.int32(step))
        else:
            carry = _steps(program, now, carry, np.int32(i), np.int32(end))
        i = end
        if not program.stops or i == num_steps:
            continue
        going = np.flatnonzero(~meshes.fetch(_done(program, carry)) & (where < real))
        if len(going) == 0:
            break
        needed = min(needed, len(going))
        if (smaller := bucket(len(going), full, _devices(rows))) < batch:
            whole = carry if batch == size else scatter(whole, carry, where)
            take = filled(going, smaller)
            carry, rows = gather(carry, take), gather(rows, take)
            where = np.where(np.arange(smaller) < len(going), where[take], size)
            batch = smaller
    return carry if batch == size else scatter(whole, carry, where)


def none_yet(x: jax.Array, broken: jax.Array | None = None) -> dict[str, jax.Array]:
    """The candidate {"x", "loss", "broken"} of the clean images, which every other one beats.

    Where `broken` (B,) says that the clean image is misclassified already, none does.
    """
    broken = jnp.zeros(x.shape[0], bool) if broken is None else broken
    return dict(x=x, loss=jnp.where(broken, jnp.inf, -jnp.inf).astype(x.dtype), broken=broken)


def rounds(one: Callable[[Inputs, int], dict[str, jax.Array]], inputs: Inputs, worst: dict[str, jax.Array],
           num_rounds: int, stops: bool) -> dict[str, jax.Array]:
    """The worst candidate of several restarts or targets.

    Args:
        one: `(inputs, round) -> candidate`.
        inputs: of all rows.
        worst: what is known before the first round.
        num_rounds: how many.
        stops: whether a row that is broken keeps its candidate; outside a traced program it is left out.
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
        going = np.flatnonzero(~meshes.fetch(worst["broken"])[:real])
        if len(going) == 0:
            break
        if (batch := bucket(len(going), full, _devices(inputs.rows))) >= size:
            with real_rows(real, full, len(going)):
                worst = _worse(worst, one(inputs, number))
            continue
        take = filled(going, batch)
        with real_rows(len(going), full):
            found = one(inputs._replace(rows=gather(inputs.rows, take)), number)
        where = np.where(np.arange(batch) < len(going), take, size)
        worst = scatter(worst, _worse(gather(worst, take), found), where)
    return worst


def worse(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Per row the broken one of two candidates, or the one of higher loss; `a` on a tie or a NaN."""
    take = (b["broken"] & ~a["broken"]) | ((b["broken"] == a["broken"]) & (b["loss"] > a["loss"]))
    return select(take, b, a)


_worse = jax.jit(worse)


def select(take: jax.Array, a: Any, b: Any) -> Any:
    """Per row `a` where `take` (B,), else `b`; pytrees of arrays with leading B."""
    return jax.tree.map(lambda u, v: jnp.where(take.reshape(-1, *[1] * (u.ndim - 1)), u, v), a, b)


def bucket(count: int, full: int, devices: int = 1) -> int:
    """The batch that `count` rows go on in: the smallest that holds them of up to six sizes, from `full` to 8 rows a
    device, in equal ratios of 1.6 or more."""
    least = min(full, _SMALLEST_BATCH * devices)
    smaller = min(_SMALLER, int(math.log(full / least, 1.6)))
    sizes = (-(-round(full * (least / full) ** (n / max(smaller, 1))) // devices) * devices
             for n in range(smaller, -1, -1))
    return next(size for size in sizes if size >= min(count, full))


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Row numbers, followed by repetitions of the first up to `size`."""
    return np.concatenate([rows, np.full(size - len(rows), rows[0])])


def gather(tree: Any, rows: np.ndarray) -> Any:
    """Rows of every array of a pytree, laid out on the devices as the array was."""
    return jax.tree.map(_laid_out_as, tree, _gather(tree, rows))


def scatter(tree: Any, part: Any, where: np.ndarray) -> Any:
    """`tree` with the rows of `part` written to rows `where`; those that are out of range are dropped."""
    return jax.tree.map(_laid_out_as, tree, _scatter(tree, part, where))


def _laid_out_as(leaf, new):
    """`new` cut over the devices as `leaf` is; what is on one device may move freely."""
    return jax.device_put(new, leaf.sharding) if len(leaf.sharding.device_set) > 1 else new


@jax.jit
def _gather(tree, rows):
    return jax.tree.map(lambda leaf: leaf[rows], tree)


@jax.jit
def _scatter(tree, part, where):
    return jax.tree.map(lambda leaf, new: leaf.at[where].set(new, mode="drop"), tree, part)


def _as_jax(inputs: Inputs) -> Inputs:
    return inputs._replace(rows=jax.tree.map(jnp.asarray, inputs.rows))


def _size(rows) -> int:
    return jax.tree.leaves(rows)[0].shape[0]


def _devices(rows) -> int:
    return max(len(leaf.sharding.device_set) for leaf in jax.tree.leaves(rows))
