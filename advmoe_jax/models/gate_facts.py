"""What a mixture of experts says of its gate: in a training step, on the progress line, in an evaluation.

B batch, M experts, m images.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from advmoe_jax.core import tables
from advmoe_jax.core.tables import Table

_NOTE = ("Weight: mean share that the gate gives an expert. Leads: share of the images on which no other has a larger "
         "weight. SA and RA are of the experts alone. Each on the clean images, and on those that break most images of "
         "the mixture.")


def metrics(passes: Mapping[str, tuple[jax.Array, dict[str, jax.Array]]]) -> dict[str, jax.Array]:
    """Of the last pass: mean weights (M,) of the gate, and the entropy of an image's weights over log M, mean."""
    *_, (_, aux) = passes.values()
    log_w = jax.nn.log_softmax(aux["gate_logits"])
    entropy = -jnp.sum(jnp.exp(log_w) * log_w, -1) / np.log(log_w.shape[-1])
    return {"gate": jnp.mean(jnp.exp(log_w), 0), "gate_entropy": jnp.mean(entropy)}


def progress(means: Mapping[str, Any]) -> str:
    """"gate 2-61 %, entropy 40 %": the least and the largest mean weight, and the mean entropy."""
    weights = 100 * np.asarray(means["gate"])
    return f"gate {weights.min():.0f}-{weights.max():.0f} %, entropy {100 * np.asarray(means['gate_entropy']):.0f} %"


def facts(y: np.ndarray, clean: Mapping[str, np.ndarray], attacked: Mapping[str, np.ndarray], among: np.ndarray,
          count: int) -> dict[str, Any]:
    """Weights, leads and accuracies of the experts, clean and attacked, as JSON.

    Args:
        y, clean, attacked, among: as `Model.facts`.
        count: k, experts that an image takes.
    """
    size = clean["gate_weights"].shape[1]
    found = {}
    for name, of, rows in (("clean", clean, np.ones_like(among)), ("attacked", attacked, among)):
        weights = of["gate_weights"][rows].reshape(-1, size)
        leads = np.bincount(np.argmax(weights, 1), minlength=size)
        found |= {f"weights_{name}": (weights.sum(0) / max(len(weights), 1)).tolist(),
                  f"leads_{name}": (leads / max(len(weights), 1)).tolist()}
    right, still = (of["member_predictions"] == y[:, None] for of in (clean, attacked))
    changed = np.argmax(clean["gate_weights"], 1) != np.argmax(attacked["gate_weights"], 1)
    order = np.argsort(-clean["gate_weights"], 1, kind="stable")[:, :count]
    return found | {
        "lead_changes": float(changed[among].mean()) if among.any() else 0.0,
        "taken": (np.bincount(order.ravel(), minlength=size) / max(len(order), 1)).tolist(),
        "member_sa": right.mean(0).tolist(), "member_ra": (right & still).mean(0).tolist()}


def fact_table(facts: Mapping[str, Any]) -> Table:
    """`facts` as reports show them."""
    columns = {"SA %": "member_sa", "weight %": "weights_clean", "leads %": "leads_clean", "RA %": "member_ra",
               "weight %, attacked": "weights_attacked", "leads %, attacked": "leads_attacked"}
    of_each = zip(*(facts[name] for name in columns.values()))
    rows = [(str(i), *map(tables.percent, rates)) for i, rates in enumerate(of_each)]
    note = f"{_NOTE} The lead changes on {tables.percent(facts['lead_changes'])} % of the attacked images."
    return Table("Experts", ("expert", *columns), rows, (note,), varying=("RA %", "weight %, attacked",
                                                                        "leads %, attacked"))
