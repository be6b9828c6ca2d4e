"""Attacks that know of the experts behind a gate: through both, past the gate, on each expert, and on the gate itself.

Verdicts are those of the mixture as users have it. B images, M experts, K classes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from advmoe_jax.attacks import build, driver, objectives, structured
from advmoe_jax.attacks.about import About
from advmoe_jax.attacks.objectives import Objective
from advmoe_jax.core.errors import one_of
from advmoe_jax.core.fields import setting
from advmoe_jax.ops import balls, gating, losses

ABOUT = About(balls.NORMS, takes="gated", needs=("member_logits", "gate_logits"))


@dataclasses.dataclass(frozen=True)
class Config(structured.Settings):
    """Settings of an attack on a mixture.

    Attributes:
        mode: "through": the loss of what all experts give together by the gate's weights.
            "constant": the same, the weights held constant.
            "expert": for each expert, its own loss; the gate has no part.
            "lead": for each expert, its own loss and the logarithm of its weight, so that it fails and leads.
            "misdirect": first another expert than that of the clean image is given the lead; from there "through".
        others: see structured.Settings.
    """

    mode: str = setting("through", "of the gate or of the experts", read=lambda mode, what: one_of(what, mode, MODES))


label = structured.label


def make(config: Config = Config()) -> build.Attack:
    """Builds `attack(outputs_fn, key, x, y) -> x_adv`; errors as pgd.make.

    `outputs_fn` is `x -> (logits, aux)` with aux["member_logits"] (B, M, K) of all experts and aux["gate_logits"]
    (B, M). Images that are misclassified when clean come back as they are.
    """
    def begin(inputs):
        rows = inputs.rows
        driver.count((1, 0), rows["x"].shape[0])
        worst, scores = _clean(inputs.logits_fn, rows["x"], rows["y"])
        lead = jnp.argmax(scores, -1).astype(jnp.int32)
        rows = rows | dict(y=dict(label=rows["y"], lead=lead))
        return inputs._replace(rows=rows), worst, _RUNS[config.mode](scores.shape[1])

    return structured.attack_by("gated", config, ABOUT, begin, stops=True)


@jax.jit
def _clean(outputs_fn, x, y):
    """The clean images as a candidate, and the gate's logits (B, M)."""
    logits, aux = outputs_fn(x)
    _, scores = structured.needed("gated", ABOUT, aux)
    return driver.none_yet(x, objectives.misclassified(logits, y)), scores


# What is raised. y is {"label": (B,), "lead": (B,), "expert": (B,)}.


def _together(outputs, y):
    aux = outputs[1]
    return losses.cross_entropy(gating.mix(aux["member_logits"], aux["gate_logits"]), y["label"])


def _past(outputs, y):
    aux = outputs[1]
    held = jax.lax.stop_gradient(aux["gate_logits"])
    return losses.cross_entropy(gating.mix(aux["member_logits"], held), y["label"])


def _alone(outputs, y):
    member_logits = outputs[1]["member_logits"]
    chosen = jnp.take_along_axis(member_logits, y["expert"][:, None, None], 1)[:, 0]
    return losses.cross_entropy(chosen, y["label"])


def _leads(outputs, y):
    log_w = jax.nn.log_softmax(outputs[1]["gate_logits"])
    return _alone(outputs, y) + jnp.take_along_axis(log_w, y["expert"][:, None], -1)[:, 0]


def _other_lead(outputs, y):
    """How far the gate's best other logit is above that of the expert that leads on the clean image."""
    return losses.margin(outputs[1]["gate_logits"], y["lead"])


def _succeeds(outputs, y):
    return objectives.misclassified(outputs[0], y["label"])


_TOGETHER, _PAST, _ALONE, _LEADS, _OTHER_LEAD = (Objective(loss, _succeeds) for loss in (
    _together, _past, _alone, _leads, _other_lead))


def _phase(objective, expert=0):
    return structured.Phase(objective, functools.partial(_aimed, expert))


def _aimed(expert, rows):
    return rows | {"y": rows["y"] | {"expert": jnp.full_like(rows["y"]["lead"], expert)}}


_RUNS = {
    "through": lambda experts: [[_phase(_TOGETHER)]],
    "constant": lambda experts: [[_phase(_PAST)]],
    "expert": lambda experts: [[_phase(_ALONE, i)] for i in range(experts)],
    "lead": lambda experts: [[_phase(_LEADS, i)] for i in range(experts)],
    "misdirect": lambda experts: [[_phase(_OTHER_LEAD), _phase(_TOGETHER)]]}
"""The runs of each mode, by the number of experts."""
MODES = tuple(_RUNS)
