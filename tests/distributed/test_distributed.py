"""How processes find each other, and what they say when they cannot."""

import concurrent.futures
import http.server
import importlib.util
import re
import socket
import threading
import time

import jax
import numpy as np
import pytest

from tests.multiprocess import free_port
from zeda_jax import distributed
from zeda_jax.cli import main as cli
from zeda_jax.cli.config_flags import take_process_flags
from zeda_jax.distributed import cluster, lifeline
from zeda_jax.distributed.cluster import Place, find_place
from zeda_jax.errors import ZedaError

SLURM = {
  "SLURM_JOB_ID": "4711",
  "SLURM_STEP_NODELIST": "node[07-08],other",
  "SLURM_NTASKS": "4",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_NUM_NODES": "4",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "2",
  "OMPI_COMM_WORLD_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture
def tpu(monkeypatch):
  """A machine whose JAX could use a TPU."""
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name == "libtpu" or find_spec(name, *a))
  monkeypatch.setattr(cluster, "_may_use_tpu", lambda: True)


def in_cluster(monkeypatch, variables):
  """JAX's detection reads the environment of the process itself."""
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  return variables


def test_one_process_is_left_alone_at_once():
  began = time.monotonic()
  assert find_place(environment={}) is None
  assert find_place("localhost:1234", 1, 0, environment={}) is None
  assert distributed.initialize("localhost:1234", 1, 0) is False
  assert time.monotonic() - began < 1
  assert distributed.describe_process() == ""
  distributed.leave(2, "nothing to leave")
  assert distributed.any_process(True) and not distributed.any_process(False)
  vote = distributed.Vote()
  assert [vote(False), vote(True), vote(False)] == [False, True, False]


def test_flags_and_environment_name_the_place():
  variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
  assert find_place(environment=variables) == Place("a:1", 3, 2)
  assert find_place("[::1]:9", 4, 0, environment=variables) == Place("[::1]:9", 4, 0)
  flags, rest = take_process_flags(["--config=x", "--coordinator", "b:2", "--num-processes=5", "--config.a=1"])
  assert flags == {"coordinator": "b:2", "num_processes": 5} and rest == ["--config=x", "--config.a=1"]


@pytest.mark.parametrize(
  ("given", "variables", "sentence"),
  [
    (("a:1", None, None), {}, "--coordinator is given, but --num-processes and --process-id are missing"),
    ((None, 2, 0), {}, "--num-processes and --process-id are given, but --coordinator is missing"),
    ((None, None, None), {"JAX_PROCESS_ID": "0"}, "--process-id is given, but"),
    ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a whole number"),
    (("a", 2, 0), {}, "--coordinator is 'a'; expected HOST:PORT"),
    (("a:0", 2, 0), {}, "--coordinator is 'a:0'; expected HOST:PORT"),
    (("a:1", 0, 0), {}, "--num-processes is 0; expected at least 1"),
    (("a:1", 2, 2), {}, "--process-id is 2; expected 0 to 1"),
    (("a:1", 2, -1), {}, "--process-id is -1; expected 0 to 1"),
  ],
)
def test_senseless_places_are_sentences(given, variables, sentence):
  with pytest.raises(ZedaError, match=re.escape(sentence)):
    find_place(*given, environment=variables)


@pytest.mark.parametrize(
  ("flags", "sentence"),
  [
    (["--num-processes=two"], "--num-processes is 'two'; expected a whole number."),
    (["--process-id"], "--process-id is ''; expected a whole number."),
    (["--coordinator="], "--coordinator is ''; expected HOST:PORT of process 0."),
    (["--coordinator=a:1", "--config=configs/tiny.py"], "--coordinator is given, but"),
  ],
)
def test_the_command_line_refuses_wrong_flags(flags, sentence, capsys):
  assert cli.main(["adapt", *flags]) == 2
  found = capsys.readouterr().err
  assert found.startswith(f"zeda adapt: {sentence}") and found.count("\n") == 1


def test_slurm_tells_the_place(monkeypatch):
  variables = in_cluster(monkeypatch, SLURM)
  port = 4711 % 2**12 + 65535 - 2**12 + 1
  assert find_place(environment=variables) == Place(f"node07:{port}", 4, 2)
  assert find_place("me:5", environment=variables) == Place("me:5", 4, 2)
  shared = variables | {"SLURM_STEP_NUM_NODES": "2"}
  assert find_place(environment=shared) == Place(f"node07:{port}", 4, 2, [0])
  assert find_place(environment=shared | {"SLURM_GPUS_PER_TASK": "1"}).local_device_ids is None
  for change in ({"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "1"}):
    assert find_place(environment=variables | change) is None
  inside_salloc = {name: value for name, value in variables.items() if name in ("SLURM_JOB_ID", "SLURM_NTASKS")}
  assert find_place(environment=inside_salloc) is None


def test_open_mpi_tells_the_place(monkeypatch):
  variables = dict(in_cluster(monkeypatch, OPEN_MPI))
  assert find_place(environment=variables) == Place("10.96.0.1:62624", 2, 1, [1])
  variables.pop("OMPI_MCA_orte_hnp_uri")  # version 5
  assert find_place("a:1", environment=variables) == Place("a:1", 2, 1, [1])
  assert find_place("a:1", environment=variables | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) == Place("a:1", 2, 1)
  with pytest.raises(ZedaError, match="one of several processes of Open MPI, which does not tell --coordinator: give"):
    find_place(environment=variables)
  assert find_place(environment={"OMPI_COMM_WORLD_SIZE": "1"}) is None


def test_gke_tells_the_place_of_tpu_pods(monkeypatch, tpu):
  from jax._src.clusters import cloud_tpu_cluster
  from jax._src.clusters import cluster as jax_cluster

  for module in (jax_cluster, cloud_tpu_cluster):
    monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
  pod = {
    "TPU_WORKER_HOSTNAMES": "localhost,other",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "TPU_SKIP_MDS_QUERY": "true",
  }
  variables = in_cluster(monkeypatch, pod)
  assert find_place(environment=variables) == Place("localhost:8482", 2, 1)
  slices = in_cluster(monkeypatch, variables | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"})
  assert find_place(environment=slices) == Place("localhost:8482", 4, 3)
  assert find_place(environment=variables | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None


class _Metadata(http.server.BaseHTTPRequestHandler):
  endpoints = ""

  def do_GET(self):
    name = self.path.rsplit("/", 1)[1]
    text = {"worker-network-endpoints": self.endpoints, "tpu-env": "A: 'b'\n", "agent-worker-number": "1"}.get(name)
    self.send_response(200 if text is not None else 404)
    self.end_headers()
    self.wfile.write((text or "").encode())

  def log_message(self, *args):
    pass


def test_a_tpu_vm_asks_its_metadata_server_and_waits_for_none(monkeypatch, tpu):
  from jax._src.clusters import cloud_tpu_cluster
  from jax._src.clusters import cluster as jax_cluster

  for module in (jax_cluster, cloud_tpu_cluster):
    monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
  for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
    monkeypatch.delenv(name, raising=False)
  variables = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "", "MEGASCALE_SLICE_ID": ""}
  server = http.server.ThreadingHTTPServer(("localhost", 0), _Metadata)
  variables = in_cluster(monkeypatch, variables | {"GCE_METADATA_IP": f"localhost:{server.server_port}"})
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    _Metadata.endpoints = "localhost"
    assert find_place(environment=variables) is None
    if importlib.util.find_spec("requests"):  # which JAX asks with
      _Metadata.endpoints = "localhost,other"
      assert find_place(environment=variables) == Place("localhost:8482", 2, 1)
  finally:
    server.shutdown()
    server.server_close()
  began = time.monotonic()
  assert find_place(environment=variables) is None  # nobody answers
  assert find_place(environment={"TPU_SKIP_MDS_QUERY": "1"}) is None
  assert time.monotonic() - began < 5


def meet_all(places, timeout):
  """What `lifeline.meet` gives for each place, in threads: connections by process, or the error."""

  def one(place):
    deadline = time.monotonic() + timeout
    try:
      return (lifeline._gather if place.process_id == 0 else lifeline._join)(place, timeout, deadline)
    except ZedaError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
    return list(pool.map(one, places))


def test_processes_meet_in_any_order_beside_strangers():
  coordinator = f"localhost:{free_port()}"
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    late = pool.submit(meet_all, [Place(coordinator, 4, i) for i in (3, 1)], 20)
    time.sleep(0.3)
    stranger = threading.Thread(target=_say_nonsense, args=(coordinator,))
    stranger.start()
    found = meet_all([Place(coordinator, 4, 0), Place(coordinator, 4, 2)], 20)
    stranger.join()
    assert [set(peers) for peers in (*found, *late.result())] == [{1, 2, 3}, {0}, {0}, {0}]
  for peers in (*found, *late.result()):
    for peer in peers.values():
      peer.connection.close()


def _say_nonsense(coordinator):
  host, port = coordinator.split(":")
  for text in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""):
    for _ in range(50):
      try:
        with socket.create_connection((host, int(port)), 1) as connection:
          connection.sendall(text)
        break
      except OSError:
        time.sleep(0.05)


def test_a_missing_process_is_a_sentence():
  coordinator = f"localhost:{free_port()}"
  first, second = meet_all([Place(coordinator, 3, 0), Place(coordinator, 3, 1)], 1.0)
  assert first.startswith(f"process 2 of 3 did not come to process 0 at {coordinator} within 1 s: start all")
  assert second == first
  (alone,) = meet_all([Place(coordinator, 2, 1)], 0.5)
  assert alone.startswith(f"process 1 of 2 cannot reach process 0 at {coordinator} within 0.5 s (Connection refused)")
  (nowhere,) = meet_all([Place("no-such-host.invalid:1234", 2, 1)], 0.5)
  assert "cannot reach process 0 at no-such-host.invalid:1234" in nowhere


@pytest.mark.parametrize(
  ("others", "sentence"),
  [
    ([Place("", 3, 1)], r"process 1 \(\S+\) has --num-processes=3, process 0 has 2: give every process the same"),
    ([Place("", 2, 0)], r"cannot listen on port \d+ of this host \(Address already in use\): choose another port"),
    ([Place("", 3, 1), Place("", 3, 1)], r"two processes, on \S+ and \S+, have --process-id=1: give every"),
  ],
)
def test_processes_that_disagree_are_told(others, sentence, monkeypatch):
  monkeypatch.setattr(lifeline, "_PORT_SECONDS", 0.5)
  coordinator = f"localhost:{free_port()}"
  count = len(others) + 1
  found = meet_all([Place(coordinator, count, 0), *(place._replace(coordinator=coordinator) for place in others)], 2.0)
  assert any(isinstance(text, str) and re.search(sentence, text) for text in found), found
  if "listen" not in sentence:
    assert all(re.search(sentence, text) for text in found), found


def test_helpers_do_the_plain_thing_in_one_process():
  assert distributed.is_primary()
  tree = {"a": np.arange(3), "b": 2}
  assert distributed.same_for_all(tree) is tree
  distributed.wait_for_all("here")
  np.testing.assert_array_equal(distributed.to_host({"a": jax.numpy.arange(3)})["a"], np.arange(3))
