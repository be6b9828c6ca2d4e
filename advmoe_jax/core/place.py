"""Where a process stands among those of its run: by the command line, or by what started them."""

import os
from typing import NamedTuple

from advmoe_jax.core.errors import UserError, first_line

# What launchers tell each process: how many there are, and which one it is. Open MPI may itself be started by Slurm.
_NUMBERS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("SLURM_NTASKS", "SLURM_PROCID"),
            ("", "JOB_COMPLETION_INDEX"))  # Kubernetes tells an indexed job's pods no number of pods
# Which one it is on its host, and two numbers that are equal where it is the only one there.
_ON_HOST = (("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", ""),
            ("SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_NODES"))


class Place(NamedTuple):
    """Which process of how many this is, and where process 0 is.

    Attributes:
        host, port: of process 0.
        count: how many processes there are.
        index: which one this is.
        devices: numbers of the GPUs of this host that are its own, where several processes share the host; None: all
            that it sees.
    """

    host: str
    port: int
    count: int
    index: int
    devices: tuple[int, ...] | None = None


def find(coordinator: str, num_processes: int | None, process_id: int | None, patience: int) -> Place:
    """The place of this process.

    Args:
        coordinator: "host:port" of process 0; "auto" where jax knows it and both numbers: on TPU, under Slurm and Open
            MPI 4, and on Kubernetes with the package `kubernetes` and the right to read pods and jobs.
        num_processes: how many there are; None: Slurm or Open MPI say it.
        process_id: which one this is; None: Slurm, Open MPI or an indexed Job of Kubernetes say it.
        patience: seconds to wait for the name of process 0's host.
    Raises:
        UserError: the three make no cluster.
    """
    if coordinator in ("", "auto"):
        if (num_processes, process_id) != (None, None):
            raise UserError(f"--num_processes is {num_processes} and --process_id {process_id}: expected both with "
                            "--coordinator host:port, and none of them without it or with auto")
        coordinator, num_processes, process_id = _detect(patience)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}: expected host:port with a port of 1 to 65535, or auto on "
                        "TPU, under Slurm or Open MPI 4")
    if num_processes is None or process_id is None:
        told = next((names for names in _NUMBERS if names[1] in os.environ), ("", ""))
        num_processes, process_id = (int(os.environ[name]) if value is None and name in os.environ else value
                                     for name, value in zip(told, (num_processes, process_id)))
    if num_processes is None or process_id is None:
        raise UserError(f"--coordinator is {coordinator}, --num_processes {num_processes} and --process_id "
                        f"{process_id}: expected all three; Slurm and Open MPI know the last two")
    for name, value in (("num_processes", num_processes), ("join_timeout", patience)):
        if value < 1:
            raise UserError(f"--{name} is {value}: expected 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id is {process_id}: expected 0 to {num_processes - 1} (--num_processes)")
    return Place(host, int(port), num_processes, process_id, _devices())


def _detect(patience: int) -> tuple[str, int, int]:
    """What jax finds: "host:port" of process 0, the number of processes, and which one this is."""
    if "OMPI_COMM_WORLD_RANK" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise UserError("--coordinator auto: Open MPI 5 does not say where process 0 is; expected host:port, with the "
                        "host of rank 0")
    from jax._src import clusters  # public jax looks for them only as it joins

    try:
        *found, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, patience)
    except Exception as error:  # of the libraries by which jax asks Google's metadata and Kubernetes, too
        raise UserError(f"--coordinator auto: the cluster cannot be read ({first_line(error)}); expected host:port"
                        ) from None
    if None in found:
        raise UserError("--coordinator auto: no TPU, Slurm, Open MPI or Kubernetes says where process 0 is; expected "
                        "host:port")
    return tuple(found)


def _devices() -> tuple[int, ...] | None:
    """As `Place.devices`. jax gives a process under Slurm and Open MPI one GPU, even one that has a host to itself, or
    whose GPUs were picked by the launcher."""
    if len(os.environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        return None
    for number, several, alone in _ON_HOST:
        if number in os.environ:
            shares = os.environ.get(several) != os.environ.get(alone, "1")
            return (int(os.environ[number]),) if shares else None
    return None
