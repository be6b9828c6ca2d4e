"""The cluster and the mesh: the one place that starts processes and lays out devices."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advmoe_jax.core import peers, place, stop
from advmoe_jax.core.errors import Preempted, UserError

AXIS = "data"
_PATIENCE = 60  # seconds in which processes that have met join, and leave
_MOMENT = 10  # seconds in which all come that were asked to stop


@contextlib.contextmanager
def cluster(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None,
            facts: Mapping[str, str] = MappingProxyType({}), patience: int = 300) -> Iterator[None]:
    """Joins the other processes of a run, and leaves with them. Nothing may ask for devices before.

    Args:
        coordinator, num_processes, process_id: as of `place.find`; without all three a process runs alone.
        facts: {name: value} that must be the same in every process.
        patience: seconds to wait for the others.
    Raises:
        UserError: the arguments make no cluster, a process does not come or differs, or there is no device.
    """
    with contextlib.ExitStack() as stack:
        ours = None
        if coordinator or (num_processes, process_id) != (None, None):
            ours = place.find(coordinator, num_processes, process_id, patience)
            if ours.count > 1:
                stack.enter_context(peers.together(*ours[:4], facts, patience))
        try:
            if ours:
                jax.distributed.initialize(f"{ours.host}:{ours.port}", ours.count, ours.index, ours.devices,
                                           cluster_detection_method="deactivate", initialization_timeout=_PATIENCE,
                                           shutdown_timeout_seconds=_PATIENCE)
            devices = jax.devices()
        except (RuntimeError, ValueError, AssertionError) as error:  # asserted: what JAX_PLATFORMS names is there
            platforms = jax.config.jax_platforms or "any"
            reason = (str(error) or "it is not installed, or has no device").splitlines()[0]
            raise UserError(f"jax cannot start its backend (JAX_PLATFORMS: {platforms}): {reason}") from None
        if ours:
            print(f"process {ours.index} of {ours.count}: {jax.local_device_count()} of {len(devices)} devices "
                  f"({devices[0].device_kind}), process {os.getpid()} on {socket.gethostname()}", file=sys.stderr,
                  flush=True)
        if ours and ours.count > 1:
            stack.enter_context(stop.shared(multihost_utils.reached_preemption_sync_point))
        try:
            yield
        except Preempted:
            if all_come("stopped", _MOMENT) and jax.process_count() > 1:
                jax.distributed.shutdown()
            raise  # or alone, as by a signal before all have met: the others end by `peers`
        else:
            _leave()  # after an error there is no barrier: the others may wait where this process will not come


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


def all_come(what: str, patience: int = 60) -> bool:
    """Whether every process of the cluster comes here within so many seconds; `what` is said once in a program.

    For what may have happened in one process alone, after which others may wait for it somewhere else.
    """
    if jax.process_count() == 1:
        return True
    from jax._src import distributed  # public jax has no barrier with a time-out

    try:
        distributed.global_state.client.wait_at_barrier(what, 1000 * patience)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def fetch(tree):
    """Arrays cut over the devices of the cluster as numpy, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def fetch_replicated(tree):
    """Arrays that every device holds whole, as numpy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)
