"""Which processes make up a run: from flags, the environment, or what a cluster tells its processes."""

import importlib.util
import os
import re
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from zeda_jax.errors import ZedaError

# What is given -> (its flag, its environment variable)
_NAMES = {
  "coordinator": ("--coordinator", "JAX_COORDINATOR_ADDRESS"),
  "num_processes": ("--num-processes", "JAX_NUM_PROCESSES"),
  "process_id": ("--process-id", "JAX_PROCESS_ID"),
}
_TOGETHER = "give --coordinator=HOST:PORT, --num-processes=N and --process-id=I together"
_METADATA_SECONDS = 2.0  # a Cloud TPU VM's own server answers within milliseconds


class Place(NamedTuple):
  """One process's place in a run of several."""

  coordinator: str  # HOST:PORT of process 0
  num_processes: int
  process_id: int
  local_device_ids: list[int] | None = None  # of the host's GPUs, where several processes share them; None means all


def find_place(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: float = 300.0,
  environment: Mapping[str, str] = os.environ,
) -> Place | None:
  """This process's place, None if it is a run of its own; see `distributed.initialize` for the rules.

  Args:
    coordinator: HOST:PORT of process 0, if given.
    num_processes: N, if given.
    process_id: of this process, if given.
    timeout: seconds that a cluster's coordinator may need to get a name.
    environment: variables to read instead of the process's own. (A cluster's are always read from its own.)

  Raises:
    ZedaError: a part is given but not the rest, or the parts make no sense.
  """
  given: dict[str, Any] = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  for name, (_, variable) in _NAMES.items():
    if given[name] is None and environment.get(variable):
      text = environment[variable]
      given[name] = text if name == "coordinator" else _number(variable, text)
  local_ids = None
  if None in given.values():
    cluster = _cluster(environment)
    if cluster is None:
      _check_none_given(given)
      return None
    given, local_ids = _detect(cluster, given, timeout, environment)
  place = Place(**given, local_device_ids=local_ids)
  _check(place)
  return place if place.num_processes > 1 else None


def _number(variable: str, text: str) -> int:
  try:
    return int(text)
  except ValueError:
    raise ZedaError(f"The environment variable {variable} is {text!r}; expected a whole number.") from None


def _check_none_given(given: Mapping[str, Any]) -> None:
  missing = [_NAMES[name][0] for name, value in given.items() if value is None]
  present = [_NAMES[name][0] for name, value in given.items() if value is not None]
  if present:
    variables = ", ".join(variable for _, variable in _NAMES.values())
    raise ZedaError(
      f"{' and '.join(present)} {'is' if len(present) == 1 else 'are'} given, but {' and '.join(missing)} "
      f"{'is' if len(missing) == 1 else 'are'} missing and no cluster tells: {_TOGETHER} (or the environment variables "
      f"{variables}), or none of them for a run of one process."
    )


def _check(place: Place) -> None:
  host, _, port = place.coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ZedaError(f"--coordinator is {place.coordinator!r}; expected HOST:PORT of process 0, such as 10.0.0.1:8476.")
  if place.num_processes < 1:
    raise ZedaError(f"--num-processes is {place.num_processes}; expected at least 1.")
  if not 0 <= place.process_id < place.num_processes:
    raise ZedaError(
      f"--process-id is {place.process_id}; expected 0 to {place.num_processes - 1}, for there are "
      f"{place.num_processes} processes."
    )


def _cluster(environment: Mapping[str, str]) -> str | None:
  """Names the cluster that started this process as one of several, None if nothing says so."""
  tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
  if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= set(environment) and int(tasks) > 1:
    return "Slurm"
  if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
    return "Open MPI"
  if _may_use_tpu():
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if (hosts.count(",") + 1) * int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
      return "Cloud TPU"
    # JAX sets the variable on machines without a TPU when it is imported, and GKE on those that have one.
    if not hosts and not environment.get("TPU_SKIP_MDS_QUERY") and _tpu_vms(environment) > 1:
      return "Cloud TPU"
  indexed_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment)
  return "Kubernetes" if indexed_job and importlib.util.find_spec("kubernetes") else None


def _may_use_tpu() -> bool:
  platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
  return (not platforms or "tpu" in platforms.split(",")) and importlib.util.find_spec("libtpu") is not None


def _tpu_vms(environment: Mapping[str, str]) -> int:
  """How many VMs the TPU of this one has, from the metadata server; 1 if none answers at once."""
  server = environment.get("GCE_METADATA_IP", "metadata.google.internal")

  def attribute(name: str) -> str:
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
      return answer.read().decode()

  try:
    vms = attribute("worker-network-endpoints").count(",") + 1
    slices = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", attribute("tpu-env"), re.MULTILINE)
  except (OSError, ValueError):
    return 1
  return vms * int(slices[1]) if slices else vms


def _detect(
  cluster: str, given: Mapping[str, Any], timeout: float, environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[int] | None]:
  """Fills in what is not given, from what the cluster tells its processes."""
  if cluster == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in environment:
    # From version 5 on it tells no address, and JAX needs mpi4py to ask for one.
    ranks = {
      "num_processes": int(environment["OMPI_COMM_WORLD_SIZE"]),
      "process_id": int(environment.get("OMPI_COMM_WORLD_RANK", "0")),
    }
    found = {name: ranks.get(name) if value is None else value for name, value in given.items()}
    local_ids: Sequence[int] | None = [int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))]
  else:
    found, local_ids = _ask_jax(cluster, given, timeout)
  missing = [_NAMES[name][0] for name, value in found.items() if value is None]
  if missing:
    raise ZedaError(
      f"This is one of several processes of {cluster}, which does not tell {' and '.join(missing)}: {_TOGETHER}."
    )
  # JAX gives every process of Slurm and Open MPI a single device; alone on its host it may have all.
  shared = local_ids is not None and not _alone_on_host(cluster, environment)
  return found, list(local_ids) if shared and local_ids else None


def _ask_jax(cluster: str, given: Mapping[str, Any], timeout: float) -> tuple[dict[str, Any], Sequence[int] | None]:
  try:
    # JAX offers this only as a part of jax.distributed.initialize, which reaches out at once.
    from jax._src.clusters import ClusterEnv

    *found, local_ids = ClusterEnv.auto_detect_unset_distributed_params(
      given["coordinator"], given["num_processes"], given["process_id"], None, None, int(timeout)
    )
  except Exception as error:
    reason = " ".join(str(error).split()).rstrip(".")[:300]
    raise ZedaError(
      f"This is one of several processes of {cluster}, but the others cannot be found ({type(error).__name__}: "
      f"{reason}): {_TOGETHER}."
    ) from error
  return dict(zip(_NAMES, found, strict=True)), local_ids


def _alone_on_host(cluster: str, environment: Mapping[str, str]) -> bool:
  if cluster == "Slurm":
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "0")
    bound = environment.get("SLURM_GPUS_PER_TASK")  # then a process sees only its own
    return bool(bound) or nodes == (environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS"))
  return environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
