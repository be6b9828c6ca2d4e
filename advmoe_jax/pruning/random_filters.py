"""Random channels go: what any other method has to beat."""

import dataclasses
import zlib

import numpy as np

from advmoe_jax.core.fields import setting
from advmoe_jax.pruning.about import About
from advmoe_jax.pruning.subject import Subject

ABOUT = About("random", "", "filter")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of `config.system` for this method."""

    method_seed: int = setting(0, "of what the method draws", least=0, most=2**32 - 1)


def scores(subject: Subject, cfg: Config) -> dict[str, np.ndarray]:
    """{name of a group of channels: (w,)}."""
    return {group.name: np.random.default_rng([cfg.method_seed, zlib.crc32(group.name.encode())]).random(group.width)
            for group in subject.channels()}
