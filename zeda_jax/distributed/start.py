"""Start and end of a run of several processes."""

import atexit
import os
import sys
import time

import jax

from zeda_jax.distributed.cluster import Place, find_place
from zeda_jax.distributed.lifeline import Lifeline, meet

_HEARTBEAT_SECONDS = 10  # after which JAX gives up a process that stands still; Lifeline sees one that ended
_place: Place | None = None
_lifeline: Lifeline | None = None


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout: float = 300.0,
) -> bool:
  """Makes this process one of several, if it is; to be called before the first use of JAX.

  The first of these that applies says which processes there are:

  1. The arguments, and where one is None JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  2. Slurm: `srun` with more than one task. Each process uses all GPUs of its node if it is the only one there, else (as
     JAX does) the one of its number on the node; JAX_LOCAL_DEVICE_IDS says otherwise.
  3. Open MPI with more than one process. (Where it does not tell the address of process 0, that must be given.)
  4. Cloud TPU with more than one host or slice: TPU_WORKER_HOSTNAMES (GKE), else the metadata server, which is asked
     only on a machine with a TPU and JAX free to use it.
  5. An indexed Kubernetes Job, if the package kubernetes is installed.

  If 1 is given in part the rest comes from 2 to 5. Without any of them, or with one process, nothing is done.

  From then on all processes live and die together. Where one dies, or its host is gone, or it ends with an error, the
  others print a sentence and end, too: with its status, or 75 (try again) if it just died. JAX's own handler of
  SIGTERM is left out: `trainer.StopSignal` serves any number of processes.

  Args:
    coordinator: HOST:PORT of process 0, a port that is free there.
    num_processes: N.
    process_id: of this process, 0 to N - 1.
    timeout: seconds to wait for all processes.

  Returns:
    Whether this is one of several processes.

  Raises:
    ZedaError: half of the arguments is missing, they make no sense or differ between the processes, or not all
      processes came in time.
  """
  global _place, _lifeline
  if _lifeline is not None:
    return True
  place = find_place(coordinator, num_processes, process_id, timeout)
  if place is None:
    return False
  # All must be there before JAX connects: what it cannot reach in time, it answers by aborting the process.
  lifeline = meet(place, timeout)
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    place.coordinator,
    place.num_processes,
    place.process_id,
    place.local_device_ids,
    cluster_detection_method="deactivate",
    initialization_timeout=60,
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
  )
  _place, _lifeline = place, lifeline
  atexit.register(_at_exit)  # runs before JAX's, which waits for all processes
  return True


def describe_process() -> str:
  """ "process 1 of 2: " to put before messages, "" in a run of one process."""
  return f"process {_place.process_id} of {_place.num_processes}: " if _place else ""


def wait_for_news(seconds: float) -> None:
  """To be called when something failed: if that is because another process ended, this one ends here and says so."""
  if _lifeline is not None:
    time.sleep(seconds)


def leave(status: int = 0, message: str = "") -> None:
  """Ends this process's part in the run; with one process it does nothing.

  With status 0 it returns when all processes have come here. Any other status makes all others end with it, and ends
  this process at once, since it could only wait for them in vain.

  Args:
    status: exit status of this process.
    message: why, for the others to print.
  """
  global _lifeline
  lifeline, _lifeline = _lifeline, None
  if lifeline is None:
    return
  if status == 0:
    lifeline.finish()
    jax.distributed.shutdown()
    return
  lifeline.fail(status, message)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _at_exit() -> None:
  uncaught = getattr(sys, "last_value", None)  # of a traceback that has just been printed
  if uncaught is not None:
    wait_for_news(2.0)
    leave(1, f"{type(uncaught).__name__}: {uncaught}")
  leave(0)
