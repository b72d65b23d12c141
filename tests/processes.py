"""Runs a function of the tests in processes of its own, with fake devices, as one program of several processes."""

import importlib
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

REPOSITORY = pathlib.Path(__file__).parents[1]


def run_everywhere(function: str, processes: int, devices: int, *args: Any, timeout: float = 600) -> list[str]:
  """Calls "module:function" with the arguments (as JSON) in every process; returns what each printed.

  Args:
    function: its module and name.
    processes: how many; one of them is no program of several processes at all.
    devices: fake CPU devices of each.
    args: what JSON can carry.
    timeout: seconds for all.
  """
  flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  children = []
  for index in range(processes):
    given = json.dumps([function, index, processes, port, list(map(_plain, args))])
    command = [sys.executable, "-m", "tests.processes", given]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children.append(subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | flags, **pipes))
  try:
    printed = [child.communicate(timeout=timeout)[0] for child in children]
  finally:
    for child in children:
      child.kill()
  for child, text in zip(children, printed, strict=True):
    assert child.returncode == 0, "\n\n".join(text[-4000:] for text in printed)
  return printed


def _plain(value: Any) -> Any:
  return str(value) if isinstance(value, pathlib.Path) else value


def main() -> None:
  function, index, processes, port, args = json.loads(sys.argv[1])
  if processes > 1:
    import jax

    jax.distributed.initialize(f"localhost:{port}", processes, index)
  module, name = function.split(":")
  getattr(importlib.import_module(module), name)(*args)


if __name__ == "__main__":
  main()
