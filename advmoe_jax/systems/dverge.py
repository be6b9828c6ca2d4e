"""The images of DVERGE: each looks like one image, and to one member of a team like another.

Yang et al., "DVERGE: Diversifying Vulnerabilities for Enhanced Robust Generation of Ensembles", NeurIPS 2020. Every
other member learns to call it what it looks like. M members, B batch, A attacks.
"""

import jax
import jax.numpy as jnp

from advmoe_jax.core import rng, units
from advmoe_jax.models import taps
from advmoe_jax.models.members import stacked
from advmoe_jax.models.team import Team
from advmoe_jax.train.step import Attack

_MOMENTUM = 1.0


def beside(attack: Attack | None, team: Team, *, eps: str, num_steps: int, per_epoch: int, seed: int) -> Attack:
    """An attack that adds such images to those of another, (B, A + M, H, W, C): of each member one.

    Each starts at its image, and moves by so many signed steps with momentum, in linf, to where one norm of the member
    gives what it gives for another image of the batch. Which norm is drawn anew in each epoch.

    Args:
        attack: what makes the first A; None: A is 0.
        team: as it is trained.
        eps: linf distance; a step is eps / num_steps.
        num_steps: of them.
        per_epoch: iterations of an epoch.
        seed: of the run.
    """
    size = units.eps(eps, "linf", "system.dverge_eps")

    def run(variables, key, x, y, index, step):
        others = jnp.take(x, jax.random.permutation(rng.stream(key, "dverge"), len(x)), 0)

        def of_member(variables):
            def given(images):
                return taps.features(lambda: team.member.outputs_fn(variables)(images))

            goal = jax.tree.map(jax.lax.stop_gradient, given(others))
            place = jax.random.randint(rng.key(seed, "dverge", step // per_epoch), (), 0, len(goal))
            chosen = jax.nn.one_hot(place, len(goal))

            def distance(images):
                return sum(weight * jnp.sum(jnp.square(a - b)) for weight, a, b in zip(chosen, given(images), goal))

            def move(_, carried):
                images, velocity = carried
                slope = jax.grad(distance)(images)
                length = jnp.mean(jnp.abs(slope), (1, 2, 3), keepdims=True)
                velocity = _MOMENTUM * velocity + slope / jnp.maximum(length, 1e-12)
                images = jnp.clip(images - size / num_steps * jnp.sign(velocity), x - size, x + size)
                return jnp.clip(images, 0, 1), velocity

            return jax.lax.fori_loop(0, num_steps, move, (x, jnp.zeros_like(x)))[0]

        found = jax.lax.stop_gradient(jnp.moveaxis(jax.lax.map(of_member, stacked(team.members(variables))), 0, 1))
        return found if attack is None else jnp.concatenate([attack(variables, key, x, y, index, step), found], 1)

    return run
