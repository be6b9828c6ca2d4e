"""What SoE adds to the training of a team: images that attack one member, and heads that say how sure a member is.

Cui et al., "Synergy-of-Experts: Collaborate to Improve Adversarial Robustness", NeurIPS 2022; its loss is
`ops.teams.soe`. A head is a linear layer beside a member's last one, on the same features, as in the released code. Of
SoE's two phases EED's eq. 35 is the first; images that attack the whole team are there as well, in the members' loss.

Heads are in `State.extra`, and so in checkpoints. They are trained with their members, by the same optimizers, and have
no masks. No answer depends on them: where SoE asks the most confident member, the team answers as it always does.
M members, B batch, A attacks, P passes, D features.
"""

import jax
import jax.numpy as jnp

from advmoe_jax.models.members import stacked
from advmoe_jax.models.team import Team
from advmoe_jax.systems import adversary
from advmoe_jax.train.state import Part, State
from advmoe_jax.train.step import Attack

NAME = "confidence"  # of the heads in State.extra
_NETWORK = "network"


def beside(attack: Attack, team: Team, config) -> Attack:
    """An attack that adds images to those of another, (B, A + M * A, H, W, C): those of `train.attack` on each member,
    which raise its cross-entropy.

    Args:
        attack: what makes the first A.
        team: as it is trained.
        config: the whole config.
    """
    on_member = adversary.training_attack(team.member, config, "ce")

    def run(variables, key, x, y, index, turn):
        found = jax.lax.map(lambda member: on_member(member, key, x, y, index, turn), stacked(team.members(variables)))
        own = jax.lax.stop_gradient(jnp.moveaxis(found, 0, 1))
        return jnp.concatenate([attack(variables, key, x, y, index, turn), own.reshape(len(x), -1, *x.shape[1:])], 1)

    return run


def begin(state: State, team: Team) -> State:
    """The state with heads, {member: {"kernel": (D,), "bias": ()}} of zeros: each says 1/2 of every image."""
    size = team.last_layer.kernel[0]
    return state.replace(extra=state.extra | {NAME: {
        group: {"kernel": jnp.zeros(size), "bias": jnp.zeros(())} for group in team.groups}})


def part() -> Part:
    """The members' parameters and their heads as what is trained."""
    def get(state):
        return {group: {_NETWORK: params, NAME: state.extra[NAME][group]} for group, params in state.params.items()}

    def put(state, trees):
        return state.replace(params=state.params | {group: of[_NETWORK] for group, of in trees.items()},
                             extra=state.extra | {NAME: state.extra[NAME] | {
                                 group: of[NAME] for group, of in trees.items()}})

    return Part(get, put)


def confidence(state: State, team: Team, features: jax.Array) -> jax.Array:
    """Logits of how probable members hold the right class to be, (B, P, M).

    Args:
        state: with heads.
        team: whose they are.
        features: (B, P, M, D) that the members' last layers read.
    """
    of = stacked([state.extra[NAME][group] for group in team.groups])
    return jnp.einsum("bpmd,md->bpm", features, of["kernel"]) + of["bias"][None, None]
