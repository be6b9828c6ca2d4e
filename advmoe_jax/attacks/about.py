"""What an attack is, for those who list, check and run it; every attack module exports one as `ABOUT`."""

import dataclasses

from advmoe_jax.core.errors import one_of
from advmoe_jax.ops import balls

TAKES = ("logits", "values", "outputs", "routed", "gated")


@dataclasses.dataclass(frozen=True)
class About:
    """Facts of an attack that do not depend on its settings.

    Attributes:
        norms: the norms that its setting `norm` may have; empty if it has no such setting.
        takes: the function that it attacks. "logits": x -> logits. "values": the same, of which it uses no gradient.
            "outputs": x -> (logits, aux). "routed": (x, route) -> (logits, aux) of a routed model. "gated": as
            "outputs", of experts behind a gate.
        needs: the entries of aux that it reads, such as "member_logits"; a model without them cannot be attacked.
        all_images: whether it also gets images that are misclassified when clean, since the papers that use it count
            those that are right after it: what does not depend on the model, and SR-GKP's attacks.
        fixed_by: the setting that makes its strength a fixed one, so that it keeps to no budget; "" if there is none.
    """

    norms: tuple[str, ...] = ()
    takes: str = "logits"
    needs: tuple[str, ...] = ()
    all_images: bool = False
    fixed_by: str = ""

    @property
    def on_one_network(self) -> bool:
        """Whether any single network can be attacked, whatever it is made of."""
        return self.takes in ("logits", "values", "outputs") and not self.needs

    def __post_init__(self):
        one_of("function that an attack takes", self.takes, TAKES)
        for norm in self.norms:
            one_of("norm of an attack", norm, balls.NORMS)
