"""ADMM: weights are drawn to a pruned copy of themselves while they train.

Zhang et al., ECCV 2018; Ye et al., "Adversarial robustness vs. model compression, or both?", ICCV 2019. The loss gets
sum_l rho / 2 |W_l - Z_l + U_l|^2; now and then Z = project(W + U), U += W - Z, and rho grows.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from advmoe_jax.core import shares
from advmoe_jax.pruning import masks


@functools.partial(jax.tree_util.register_dataclass, data_fields=("z", "u", "rho"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Admm:
    """Auxiliary variables.

    Attributes:
        z: {path: (k, k, I, O)}, pruned copies.
        u: {path: (k, k, I, O)}, scaled duals.
        rho: (), weight of the penalty.
    """

    z: dict[str, jax.Array]
    u: dict[str, jax.Array]
    rho: jax.Array


def project(kernel: jax.Array, ratio: str | float, unit: str = "weight") -> jax.Array:
    """The nearest kernel with a share `ratio` of its units zero: those of the smallest l2 norms.

    Args:
        kernel: (k, k, I, O) or (I, O).
        ratio: share that is removed, less than 1.
        unit: as `masks.select`.
    """
    return _masked({"kernel": kernel}, ratio, unit)["kernel"]


def begin(kernels: Mapping[str, jax.Array], ratio: str | float, unit: str = "weight", rho: float = 1e-3) -> Admm:
    """Z = project(W), U = 0. Arguments as `project`, of several kernels."""
    return Admm(_masked(kernels, ratio, unit), jax.tree.map(jnp.zeros_like, dict(kernels)), jnp.float32(rho))


def penalty(kernels: Mapping[str, jax.Array], admm: Admm) -> jax.Array:
    """() sum of rho / 2 |W - Z + U|^2."""
    return admm.rho / 2 * sum(
        jnp.sum(jnp.square(kernels[path] - admm.z[path] + admm.u[path])) for path in admm.z)


def update(kernels: Mapping[str, jax.Array], admm: Admm, ratio: str | float, unit: str = "weight",
           growth: float = 1.3) -> Admm:
    """Z = project(W + U), U += W - Z, and rho times `growth`."""
    moved = {path: kernels[path] + admm.u[path] for path in admm.z}
    z = _masked(moved, ratio, unit)
    return Admm(z, {path: moved[path] - z[path] for path in z}, admm.rho * growth)


def _masked(kernels, ratio, unit):
    keep = 1 - shares.share(ratio, "ratio")
    kept = masks.select({path: jnp.abs(kernel) for path, kernel in kernels.items()}, keep, unit=unit, norm="l2")
    return {path: jnp.where(kept[path], kernel, 0) for path, kernel in kernels.items()}
