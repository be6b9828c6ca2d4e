"""The masks of the run that it starts from: those that a search has found."""

import numpy as np

from advmoe_jax.core.errors import UserError
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("masks of the run", "", "weight", is_told=False)


def masks(subject: Subject, cfg: object) -> tuple[dict[str, np.ndarray], dict]:
    """{path of a layer: mask of its kernel}, and {} as there is nothing to say of it."""
    if not subject.given:
        raise UserError("the run that this one starts from has no masks: expected one that searched for some, or "
                        "another method")
    return {path.removesuffix("/kernel"): mask for path, mask in subject.given.items() if path.endswith("/kernel")}, {}
