"""Runs of several real processes on this machine, each with fake CPU devices of its own.

  with start([sys.executable, "worker.py", "--steps=3"], num_processes=2, devices=2) as group:
    group.wait_for(0, "step 2")
    group.send(1, signal.SIGKILL)
    results = group.wait(60)

The processes find each other through the environment that `zeda_jax.distributed.initialize` reads.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

REPOSITORY = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Result:
  """How a process ended."""

  status: int  # negative: the signal that killed it
  output: str  # stdout and stderr
  ended: float  # time.monotonic()


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def environment(devices: int, changes: Mapping[str, str] | None = None) -> dict[str, str]:
  """That of a process with so many fake CPU devices, which imports this repository.

  Its programs are compiled without LLVM's optimisations, which takes half of the time: such processes prove what
  devices and processes send each other, within tolerances.
  """
  kept = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  flags = f"{kept} --xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": flags.strip(),
    "PYTHONPATH": str(REPOSITORY),
    "PYTHONUNBUFFERED": "1",
    **(changes or {}),
  }


class Group:
  """Started processes; leaving the context kills those that still run."""

  def __init__(self, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]):
    self._lines: list[list[str]] = [[] for _ in commands]
    self._ended = [0.0 for _ in commands]
    self.processes = [
      subprocess.Popen(
        command, env=dict(variables), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
      )
      for command, variables in zip(commands, environments, strict=True)
    ]
    self._readers = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(len(commands))]
    for reader in self._readers:
      reader.start()

  def _read(self, index: int) -> None:
    stream = self.processes[index].stdout
    assert stream is not None
    for line in stream:
      self._lines[index].append(line)
    self.processes[index].wait()
    self._ended[index] = time.monotonic()

  def output(self, index: int) -> str:
    return "".join(self._lines[index])

  def wait_for(self, index: int, pattern: str, seconds: float = 120) -> re.Match[str]:
    """Waits until the output of a process has the regular expression."""
    deadline = time.monotonic() + seconds
    while True:
      running = self._readers[index].is_alive()
      if found := re.search(pattern, self.output(index)):
        return found
      assert running, f"process {index} ended without {pattern!r}:\n{self.output(index)}"
      assert time.monotonic() < deadline, (
        f"no {pattern!r} within {seconds} s from process {index}:\n{self.output(index)}"
      )
      time.sleep(0.005)

  def send(self, index: int, number: signal.Signals) -> None:
    self.processes[index].send_signal(number)

  def wait(self, seconds: float = 120) -> list[Result]:
    """Waits until all have ended."""
    deadline = time.monotonic() + seconds
    for index, reader in enumerate(self._readers):
      reader.join(max(0.0, deadline - time.monotonic()))
      outputs = "\n".join(f"--- process {i}:\n{self.output(i)}" for i in range(len(self.processes)))
      assert not reader.is_alive(), f"process {index} still runs after {seconds} s\n{outputs}"
    return [
      Result(process.returncode, self.output(index), self._ended[index]) for index, process in enumerate(self.processes)
    ]

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc: object) -> None:
    for process in self.processes:
      if process.poll() is None:
        process.kill()
    for reader in self._readers:
      reader.join(10)


def start(
  command: Sequence[str], num_processes: int = 1, devices: int = 1, changes: Mapping[str, str] | None = None
) -> Group:
  """Starts the same command once for each process of a run; `changes` are added to the environment."""
  coordinator = f"localhost:{free_port()}"
  environments = []
  for process in range(num_processes):
    place = {
      "JAX_COORDINATOR_ADDRESS": coordinator,
      "JAX_NUM_PROCESSES": str(num_processes),
      "JAX_PROCESS_ID": str(process),
    }
    environments.append(environment(devices, {**(place if num_processes > 1 else {}), **(changes or {})}))
  return Group([list(command)] * num_processes, environments)


def run_everywhere(function: str, num_processes: int, devices: int, *args: Any, seconds: float = 600) -> list[str]:
  """Calls "module:function" with the arguments (as JSON) in every process of a run; returns what each printed."""
  given = json.dumps([function, *(str(arg) if isinstance(arg, pathlib.Path) else arg for arg in args)])
  with start([sys.executable, "-m", "tests.multiprocess", given], num_processes, devices) as group:
    results = group.wait(seconds)
  printed = [result.output for result in results]
  assert not any(result.status for result in results), "\n\n".join(text[-4000:] for text in printed)
  return printed


def main() -> None:
  from zeda_jax import distributed

  distributed.initialize()
  function, *args = json.loads(sys.argv[1])
  module, name = function.split(":")
  getattr(importlib.import_module(module), name)(*args)


if __name__ == "__main__":
  main()
