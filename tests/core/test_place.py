"""What each launcher tells its processes, and what becomes of it."""

import pytest
from jax._src.clusters import cloud_tpu_cluster

from advmoe_jax.core import place
from advmoe_jax.core.errors import UserError

SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="node[03-05]", SLURM_NTASKS="3", SLURM_PROCID="2", SLURM_LOCALID="0",
             SLURM_STEP_NUM_NODES="3")
MPI = dict(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="1",
           OMPI_COMM_WORLD_LOCAL_SIZE="2")
MPI_4 = MPI | dict(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
GKE = dict(TPU_WORKER_HOSTNAMES="localhost,advmoe-slice-0-1.advmoe", TPU_WORKER_ID="1")
POD = dict(JOB_COMPLETION_INDEX="3")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """Nothing has started this process, whatever runs the tests."""
    for name in (*SLURM, *MPI_4, *GKE, *POD, "CUDA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("told, coordinator, number, expected", [
    (SLURM, "auto", None, ("node03", 61447, 3, 2, None)),
    (SLURM | dict(SLURM_NTASKS="24", SLURM_PROCID="17", SLURM_LOCALID="1"), "auto", None,
     ("node03", 61447, 24, 17, (1,))),
    (SLURM | dict(SLURM_NTASKS="24", SLURM_LOCALID="1", CUDA_VISIBLE_DEVICES="1"), "auto", None,
     ("node03", 61447, 24, 2, None)),
    (SLURM, "login:4000", None, ("login", 4000, 3, 2, None)),
    (MPI_4, "auto", None, ("10.96.0.1", 62624, 4, 3, (1,))),
    (SLURM | MPI, "node03:4000", None, ("node03", 4000, 4, 3, (1,))),  # mpirun of Open MPI 5 in a job
    (MPI | dict(OMPI_COMM_WORLD_LOCAL_SIZE="1"), "[fe80::1]:4000", None, ("[fe80::1]", 4000, 4, 3, None)),
    (GKE, "auto", None, ("localhost", 8482, 2, 1, None)),
    (POD, "advmoe-slice-0-0.advmoe:8476", 4, ("advmoe-slice-0-0.advmoe", 8476, 4, 3, None))],
    ids=["slurm", "slurm_by_gpu", "slurm_that_binds_gpus", "slurm_with_host", "open_mpi_4", "open_mpi_5",
         "open_mpi_5_alone", "gke", "indexed_job"])
def test_a_launcher_knows_it(told, coordinator, number, expected, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", told is GKE)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda name: None)  # a slice alone
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert place.find(coordinator, number, None, 1) == expected


@pytest.mark.parametrize("told, coordinator, words", [
    (SLURM | MPI, "auto", "Open MPI 5 does not say where process 0 is; expected host:port"),
    (MPI_4 | dict(OMPI_MCA_orte_hnp_uri="x"), "auto", "auto: the cluster cannot be read (invalid literal"),
    (POD, "advmoe-slice-0-0.advmoe:8476", "--num_processes None and --process_id 3: expected all three")])
def test_what_a_launcher_does_not_say(told, coordinator, words, monkeypatch):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        place.find(coordinator, None, None, 1)
    assert words in str(refused.value) and "\n" not in str(refused.value)
