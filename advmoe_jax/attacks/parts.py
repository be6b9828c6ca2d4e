"""PGD on one part of a routed network: on its router, or on its experts along routes that nothing changes.

For studies of where a network breaks. What is honest to report is the worst case over the attacks of adaptive.py, which
only count answers of hard routing. B images, L routed choices, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, objectives, pgd
from advmoe_jax.attacks.objectives import Objective
from advmoe_jax.ops import routing


def on_router(config: pgd.Config) -> build.Attack:
    """Builds `attack(routed_fn, key, x, ids) -> x_adv`, which moves images to other experts, whatever the answer.

    Args:
        config: of PGD, whose loss has no part.
    Returns:
        The attack; `routed_fn` is `(x, route) -> (logits, aux)` with aux["router_logits"] (B, L, E), `ids` (B, L) what
        the clean images choose. An image has been broken where any layer chooses otherwise.
    """
    return _of_routed(pgd.make(dataclasses.replace(config, loss=_OTHER_CHOICE)), _hard)


def on_routes(config: pgd.Config) -> build.Attack:
    """Builds `attack(routed_fn, key, x, y, routes) -> x_adv`: PGD while image b takes expert routes[b, l] in layer l.

    Args:
        config: of PGD, with a loss of labels.
    Returns:
        The attack; `routed_fn` as of `on_router`, `routes` (B, L). An image has been broken where the network answers
        wrongly on that route.
    """
    return _of_routed(pgd.make(dataclasses.replace(config, loss=_on_logits(config.loss))), _fixed)


def _of_routed(attack: build.Attack, model: Callable) -> build.Attack:
    def run(routed_fn, key, x, y, *route):
        return attack(jax.tree_util.Partial(model, routed_fn), key, x, y, *route)

    return run


def _hard(routed_fn, x):
    return routed_fn(x, routing.hard())


def _fixed(routed_fn, x, route):
    return routed_fn(x, routing.fixed(route))


def _leaves(outputs, ids):
    return jnp.any(jnp.argmax(outputs[1]["router_logits"], -1) != ids, -1)


_OTHER_CHOICE = Objective(lambda outputs, ids: routing.other_choice(outputs[1]["router_logits"], ids), _leaves)


@functools.cache
def _on_logits(loss: str) -> Objective:
    """An objective of logits as one of (logits, aux); the same every time, so that programs are compiled once."""
    named = objectives.get(loss)
    return Objective(lambda outputs, y: named.loss(outputs[0], y), lambda outputs, y: named.success(outputs[0], y))
