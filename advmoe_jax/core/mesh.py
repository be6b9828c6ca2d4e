"""The cluster and the mesh: the one place that starts processes and lays out devices."""

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from advmoe_jax.core import peers
from advmoe_jax.core.errors import Preempted, UserError

AXIS = "data"
_PATIENCE = 60  # seconds in which processes that have met join, and leave


@contextlib.contextmanager
def cluster(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None,
            facts: Mapping[str, str] = MappingProxyType({}), patience: int = 300) -> Iterator[None]:
    """Joins the other processes of a run, and leaves with them. Nothing may ask for devices before.

    Args:
        coordinator: "host:port" of process 0; "auto" on a TPU pod or under SLURM, which know it and the two numbers;
            "" for a process that runs alone.
        num_processes: how many processes there are.
        process_id: which one this is.
        facts: {name: value} that must be the same in every process.
        patience: seconds to wait for the others.
    Raises:
        UserError: the arguments make no cluster, a process does not come or differs, or there is no device.
    """
    with contextlib.ExitStack() as stack:
        if coordinator or (num_processes, process_id) != (None, None):
            host, port, count, index = _place(coordinator, num_processes, process_id, patience)
            if count > 1:
                stack.enter_context(peers.together(host, port, count, index, facts, patience))
        try:
            if coordinator:
                jax.distributed.initialize(f"{host}:{port}", count, index, initialization_timeout=_PATIENCE,
                                           shutdown_timeout_seconds=_PATIENCE)
            jax.devices()
        except (RuntimeError, ValueError, AssertionError) as error:  # asserted: what JAX_PLATFORMS names is there
            platforms = jax.config.jax_platforms or "any"
            reason = (str(error) or "it is not installed, or has no device").splitlines()[0]
            raise UserError(f"jax cannot start its backend (JAX_PLATFORMS: {platforms}): {reason}") from None
        try:
            yield
        except Preempted:
            _leave()
            raise
        else:
            _leave()  # after an error there is no barrier: the others may wait where this process will not come


def _place(coordinator: str, num_processes: int | None, process_id: int | None, patience: int
           ) -> tuple[str, int, int, int]:
    """Host and port of process 0, the number of processes, and which one this is."""
    if coordinator in ("", "auto"):
        if (num_processes, process_id) != (None, None):
            raise UserError(f"--num_processes is {num_processes} and --process_id {process_id}: expected both with "
                            "--coordinator host:port, and none of them without it or with auto")
        coordinator, num_processes, process_id = _detect(patience)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}: expected host:port with a port of 1 to 65535, or auto on a "
                        "TPU pod or under SLURM")
    if num_processes is None or process_id is None:
        raise UserError(f"--coordinator is {coordinator}, --num_processes {num_processes} and --process_id "
                        f"{process_id}: expected all three")
    for name, value in (("num_processes", num_processes), ("join_timeout", patience)):
        if value < 1:
            raise UserError(f"--{name} is {value}: expected 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id is {process_id}: expected 0 to {num_processes - 1} (--num_processes)")
    return host, int(port), num_processes, process_id


def _detect(patience: int) -> tuple[str, int, int]:
    """What a TPU pod or SLURM knows: "host:port" of process 0, the number of processes, and which one this is."""
    from jax._src import clusters  # public jax looks for them only as it joins

    try:
        *found, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, patience)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"--coordinator auto: the cluster cannot be read ({error}); expected host:port") from None
    if None in found:
        raise UserError("--coordinator auto: this is no TPU pod and no SLURM job; expected host:port")
    return tuple(found)


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
