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
    """

    title: str
    venue: str
    unit: str
    reads: tuple[str, ...] = ()
    when: str = "once"
    leaves_out: str = ""

    @property
    def needs_images(self) -> bool:
        return bool(self.reads)
