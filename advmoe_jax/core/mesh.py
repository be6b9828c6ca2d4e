"""The cluster and the mesh: the one place that starts processes and lays out devices."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advmoe_jax.core.errors import Preempted, UserError

AXIS = "data"
_PATIENCE = 60  # seconds that a process which failed waits for the others


@contextlib.contextmanager
def cluster(coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> Iterator[None]:
    """Joins the other processes of a run, and leaves with them. Nothing may ask for devices before.

    Args:
        coordinator: "host:port" of process 0; "auto" on a TPU pod or under SLURM, which know it and the two numbers;
            "" for a process that runs alone.
        num_processes: how many processes there are.
        process_id: which one this is.
    Raises:
        UserError: the arguments make no cluster, the others cannot be reached, or there is no device.
    """
    automatic = coordinator == "auto"
    if coordinator and not automatic and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator is {coordinator!r}: expected host:port, or auto on a TPU pod or under SLURM")
    if num_processes < 1 or (num_processes, process_id) != (1, 0) and (automatic or not coordinator):
        raise UserError(f"--num_processes is {num_processes} and --process_id {process_id}: expected 1 or more "
                        "processes, and with several of them --coordinator host:port")
    if coordinator and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id is {process_id}: expected 0 to {num_processes - 1} (--num_processes)")
    try:
        timeouts = dict(initialization_timeout=1800, shutdown_timeout_seconds=_PATIENCE)
        if automatic:
            jax.distributed.initialize(**timeouts)
        elif coordinator:
            jax.distributed.initialize(coordinator, num_processes, process_id, **timeouts)
        jax.devices()
    except (RuntimeError, ValueError, AssertionError) as error:  # jax asserts that what JAX_PLATFORMS asks for is there
        platforms = jax.config.jax_platforms or "any"
        reason = (str(error) or "it is not installed, or has no device").splitlines()[0]
        raise UserError(f"jax cannot start its backend (JAX_PLATFORMS: {platforms}): {reason}") from None
    try:
        yield
    except Preempted:
        _leave()
        raise
    except UserError:
        # The others may wait in a collective that this process will not come to: no barrier without a time limit.
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        raise
    else:
        _leave()


def _leave():
    """Waits for all processes, so that none is cut off by another's exit."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("end")
        jax.distributed.shutdown()


def make() -> Mesh:
    """A mesh of all devices with the one axis `data`.

    The axis is Auto: in an Explicit mesh, which is jax's default, indexing by arrays raises.
    """
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis is cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def check_batch_size(mesh: Mesh, batch_size: int, what: str) -> None:
    """Raises UserError unless a global batch cuts evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{what} is {batch_size}: expected a positive multiple of the {mesh.size} devices")


def agree(answer: bool) -> bool:
    """What process 0 answers, in every process of the cluster."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer)))


def fetch(tree):
    """Arrays cut over the devices of the cluster as numpy, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def fetch_replicated(tree):
    """Arrays that every device holds whole, as numpy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)
