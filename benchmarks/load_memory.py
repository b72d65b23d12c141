"""Peak host memory of several processes that load one checkpoint onto a mesh, beside the share that each of them holds.

  python benchmarks/load_memory.py --gigabytes 6 --processes 2 --devices 4

Every process has `--devices` CPU devices, whose memory is the host's: its peak is its share of the parameters, what JAX
itself needs, and whatever loading adds to that.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from convert_memory import num_bytes, synthetic_config, write_synthetic


def work(path: str, coordinator: str, processes: int, index: int, experts: int) -> None:
  """One process: loads its part and prints what it held and took, as JSON."""
  import resource

  import jax

  jax.distributed.initialize(coordinator, processes, index)
  from zeda_jax import load_hf
  from zeda_jax.checkpoint.safetensors_io import StoredTensor
  from zeda_jax.config import read_config
  from zeda_jax.models.params import split_model
  from zeda_jax.sharding import Sharding, make_mesh

  read_bytes, read = 0, StoredTensor._read_bytes

  def counted(self: StoredTensor, skip: int, shape: tuple[int, ...]) -> Any:
    nonlocal read_bytes
    block = read(self, skip, shape)
    read_bytes += block.nbytes
    return block

  StoredTensor._read_bytes = counted  # type: ignore[method-assign]
  sharding = Sharding(make_mesh(-1, experts, num_experts=read_config(path).num_experts))
  jax.block_until_ready(jax.numpy.zeros(()) + 1)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  start = time.perf_counter()
  params = split_model(load_hf(path, sharding=sharding.parameter))[1]
  jax.block_until_ready(params)
  held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  record = {"held": held, "before": before, "peak": peak, "read": read_bytes, "seconds": time.perf_counter() - start}
  print(json.dumps(record), flush=True)


def measure(path: pathlib.Path, processes: int, devices: int, experts: int) -> list[dict[str, float]]:
  """One record per process; see `work`."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    coordinator = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  # A child starts with the peak of the process that forks it, so a shell in between starts it anew.
  commands = [
    ["sh", "-c", 'exec "$@"', "sh", sys.executable, __file__, "--work", str(path), coordinator]
    + [str(number) for number in (processes, index, experts)]
    for index in range(processes)
  ]
  running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands]
  try:
    outputs = [process.communicate()[0] for process in running]
  finally:
    for process in running:
      if process.poll() is None:
        process.kill()
  if any(process.returncode for process in running):
    raise RuntimeError("a process failed; its message stands above.")
  return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
  if sys.argv[1:2] == ["--work"]:
    path, coordinator, *numbers = sys.argv[2:]
    return work(path, coordinator, *map(int, numbers))
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gigabytes", type=float, default=6.0)
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument("--devices", type=int, default=4, help="of each process")
  parser.add_argument("--experts", type=int, default=4, help='devices along the mesh\'s "expert" axis')
  parser.add_argument("--directory", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()))
  args = parser.parse_args()
  config = synthetic_config(args.gigabytes)
  with tempfile.TemporaryDirectory(dir=args.directory, prefix="load-memory-") as scratch:
    path = pathlib.Path(scratch) / "model"
    write_synthetic(config, path, 2 * 10**9)
    print(f"{num_bytes(config) / 1e9:.2f} GB, {args.processes} processes x {args.devices} devices")
    columns = {"process": 8, "share MB": 10, "before MB": 11, "peak MB": 9, "(peak - before) / share": 25, "read MB": 9}
    print("".join(f"{name:>{width}}" for name, width in columns.items()) + "      s")
    for index, r in enumerate(measure(path, args.processes, args.devices, args.experts)):
      ratio = (r["peak"] - r["before"]) / r["held"]
      print(
        f"{index:>8}{r['held'] / 1e6:>10.0f}{r['before'] / 1e6:>11.0f}{r['peak'] / 1e6:>9.0f}{ratio:>25.2f}"
        f"{r['read'] / 1e6:>9.0f}{r['seconds']:>7.1f}"
      )


if __name__ == "__main__":
  main()
