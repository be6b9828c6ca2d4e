"""A sign that a robustness evaluation cannot be trusted, or something else that its readers should know."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Flag:
    """What was noticed.

    Attributes:
        name: of the check.
        reason: what was measured, and what was expected.
        unreliable: whether robust accuracies cannot be trusted because of it; else it is worth knowing.
    """

    name: str
    reason: str
    unreliable: bool = True
