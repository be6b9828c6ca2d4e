"""What an attack increases, and when it has won. B batch, K classes."""

import collections
import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.attacks import driver
from advmoe_jax.core import tree as trees
from advmoe_jax.core.errors import UserError, one_of
from advmoe_jax.ops import losses


@dataclasses.dataclass(frozen=True)
class Objective:
    """A pair of functions of (outputs, y); y is what the attack was given beside the images.

    Attributes:
        loss: value per example (B,) that the attack increases.
        success: (B,) bool, whether the example is broken. A broken iterate beats every other one.
    """

    loss: Callable[[Any, Any], jax.Array]
    success: Callable[[Any, Any], jax.Array]


def misclassified(logits: jax.Array, y: jax.Array) -> jax.Array:
    """(B, K), (B,) labels -> (B,) bool. A NaN logit counts as misclassified."""
    return (jnp.argmax(logits, -1) != y) | jnp.any(jnp.isnan(logits), -1)


def _misclassified_first(logits: jax.Array, y: tuple[jax.Array, jax.Array]) -> jax.Array:
    return misclassified(logits, y[0])


NAMED = {
    "ce": Objective(losses.cross_entropy, misclassified),
    "margin": Objective(losses.margin, misclassified),
    "dlr": Objective(losses.dlr, misclassified),
    "kl": Objective(lambda logits, clean_logits: losses.kl(clean_logits, logits),
                    lambda logits, _: jnp.zeros(logits.shape[0], bool)),
}
"""By name; they take labels (B,), but for kl, which takes the logits (B, K) of the clean images (TRADES)."""

TARGETED = {
    "ce": Objective(lambda logits, y: -losses.cross_entropy(logits, y[1]), _misclassified_first),
    "margin": Objective(lambda logits, y: losses.margin_to(logits, *y), _misclassified_first),
    "dlr": Objective(lambda logits, y: losses.dlr_targeted(logits, *y), _misclassified_first),
}
"""By name; they take (labels, targets), (B,) each. Success is any misclassification."""


def get(objective: str | Objective) -> Objective:
    """The objective of that name, or the one given."""
    if isinstance(objective, Objective):
        return objective
    return NAMED[one_of("attack loss", objective, NAMED)]


def takes(objective: str | Objective) -> str | None:
    """What `build.inputs_of` is to look at: the logits, if the objective is one of labels."""
    return None if isinstance(objective, Objective) or objective == "kl" else "logits"


def gradient(objective: Objective, model_fn: jax.tree_util.Partial, x: jax.Array, y: Any, *more: jax.Array
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss (B,), its gradient, and success (B,). `more` is what the model takes beside them."""
    def total(u):
        outputs = model_fn(u, *more)
        loss = objective.loss(outputs, y)
        return jnp.sum(loss), (loss, objective.success(outputs, y))

    grad, (loss, success) = jax.grad(total, has_aux=True)(x)
    return loss, grad, success


class _Closure(NamedTuple):
    """A function as it was in its last attack: its program as text, the constants in that, the model made of it."""

    function: Callable
    program: str
    constants: list[Any]
    model: jax.tree_util.Partial


_closures: collections.OrderedDict[tuple, _Closure] = collections.OrderedDict()
_MOST_CLOSURES = 4  # whose weights are kept


def partial(function: Callable, *examples: jax.Array) -> jax.tree_util.Partial:
    """A model as attacks take it.

    The weights of a plain closure become constants of compiled programs. The closure may have other weights in the next
    attack, since Python reads them at each call. So every attack traces it again, and compiled programs are used again
    only if the model is still the same.

    Args:
        function: a `jax.tree_util.Partial`, or a function of arrays like `examples`.
        examples: arrays of which the shapes and types count.
    Returns:
        The model; what it gives has the float type of the images, whatever it computes in.
    """
    if isinstance(function, jax.tree_util.Partial):
        return function if function.func is _typed else jax.tree_util.Partial(_typed, function)
    # jax remembers what it traced of a function
    model = jax.tree_util.Partial(_typed, jax.tree_util.Partial(lambda *inputs: function(*inputs)))
    with tracing(*examples[1:]):
        traced = jax.make_jaxpr(model)(*(jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in examples))
    if trees.is_traced(traced.consts):
        return model  # nothing is compiled here
    program = re.sub(r" at 0x[0-9a-f]+", "", str(traced.jaxpr))
    # Methods are other objects each time; what is kept keeps the number of `self` from being given away.
    key = id(getattr(function, "__self__", function)), getattr(function, "__func__", None)
    known = _closures.pop(key, None)
    if known is None or program != known.program or not _same(traced.consts, known.constants):
        constants = [np.array(c) if isinstance(c, np.ndarray) else c for c in traced.consts]
        known = _Closure(function, program, constants, model)
    _closures[key] = known
    if len(_closures) > _MOST_CLOSURES:
        _closures.popitem(last=False)
    return known.model


def _typed(model_fn, x, *more):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, x.dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
                        else leaf, model_fn(x, *more))


@contextlib.contextmanager
def tracing(*keys: jax.Array) -> Iterator[None]:
    """Turns what goes wrong while a model of images, and of keys if there are any, is traced into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the model's own code raises
        takes = "(images, keys), since attacks with eot average over a random model's draws" if keys else "images"
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"jax cannot trace logits_fn: {type(error).__name__}: {reason}; expected a pure function of "
                        f"{takes}, in evaluation mode") from error


def _same(constants, before):
    """Arrays of jax never change; those of numpy may have."""
    return len(constants) == len(before) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a is b
        for a, b in zip(constants, before))


def logits_fn(outputs_fn: Callable) -> jax.tree_util.Partial:
    """`x -> logits` of a model `x -> (logits, aux)`, with its weights still arguments of a traced program."""
    return jax.tree_util.Partial(_first, outputs_fn)


def _first(outputs_fn, *inputs):
    return outputs_fn(*inputs)[0]


def clean(inputs: driver.Inputs, targets: int, noisy: bool = False,
          success: Callable[[Any, Any], jax.Array] = misclassified) -> tuple[dict[str, jax.Array], jax.Array]:
    """One pass over the clean images: a driver's candidate, and a ranking (B, min(targets, K - 1)) of classes.

    Where the clean image is a `success` of (outputs, y) the candidate is broken, hence final. The ranking holds the
    classes other than the label by falling logit. `noisy` says whether the model takes keys (B,) too.
    """
    driver.count((1, 0), inputs.rows["x"].shape[0])
    return _clean(inputs.logits_fn, inputs.rows, targets, noisy, success)


@functools.partial(jax.jit, static_argnames=("targets", "noisy", "success"))
def _clean(logits_fn, rows, targets, noisy, success):
    x, y = rows["x"], rows["y"]
    outputs = logits_fn(x, rows["keys"]) if noisy else logits_fn(x)
    ranking = jnp.zeros((x.shape[0], 0), jnp.int32)
    if targets:
        ranking = jax.lax.top_k(losses.others(outputs, y), min(targets, outputs.shape[-1] - 1))[1]
    return driver.none_yet(x, success(outputs, y)), ranking
