"""What a pruning method says of itself."""

import dataclasses

WHEN = ("once", "hard", "soft", "decay")


@dataclasses.dataclass(frozen=True)
class About:
    """Facts about a pruning method; a module of this room that prunes exports one as ABOUT.

    Attributes:
        title: as tables name it, "L1Norm".
        venue: "ICLR 2017".
        unit: what is removed: "filter", "channel", "grouped kernel", "weight".
        reads: what its scores are made of beside weights: "gradients" and "features" need images.
        when: it chooses "once", before fine-tuning; or after every epoch, what is removed being zero and resting until
            then ("hard") or going on to be trained ("soft"); or once, and what is removed fades away ("decay").
        leaves_out: of the original, "" if nothing.
        setup: what it needs beside images, pruning and training on, "" if nothing.
        attacked: whether its images are attacked ones, by definition.
        is_told: whether it is told how much goes.
    """

    title: str
    venue: str
    unit: str
    reads: tuple[str, ...] = ()
    when: str = "once"
    leaves_out: str = ""
    setup: str = ""
    attacked: bool = False
    is_told: bool = True

    @property
    def needs_images(self) -> bool:
        return bool(self.reads)

    @property
    def type(self) -> str:
        """By what goes: "C" channels, "F" filters, "GK" grouped kernels, "W" weights."""
        return {"channel": "C", "filter": "F", "grouped kernel": "GK"}.get(self.unit, "W")

    @property
    def procedure(self) -> str:
        """Whether it chooses and removes at once."""
        return "One-shot" if self.when == "once" else "Iterative"

    @property
    def is_masked(self) -> bool:
        """Whether networks hold zeros while they are trained, so that a smaller one comes at the end, if at all."""
        return self.when != "once" or self.type == "W"

    @property
    def fully_pruned(self) -> str:
        """When the network first has the cost that was asked for."""
        return {"soft": "after each epoch", "decay": "once all has faded"}.get(self.when, "before training")
