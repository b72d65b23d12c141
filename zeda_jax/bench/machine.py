"""The machine that is measured on: what it is, and how fast it multiplies and copies."""

import datetime
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zeda_jax.bench.timing import measure


class Machine(NamedTuple):
  """Where the numbers are from.

  Attributes:
    platform: of JAX: cpu, gpu or tpu.
    dense_rate: FLOP/s of a large dense product in the type that is measured.
    copy_rate: bytes/s, read and written ones added, of an operation on a large array.
  """

  platform: str
  kind: str
  threads: int
  dense_rate: float
  copy_rate: float


def threads() -> int:
  """Processor cores that this process may use; XLA's CPU backend starts as many threads."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_machine(dtype: str, small: bool = False) -> Machine:
  """Measures the rates. `small` takes toy sizes, whose rates mean little."""
  platform = jax.default_backend()
  side = 128 if small else 2048 if platform == "cpu" else 8192
  count = (1 << 16) if small else (1 << 26) if platform == "cpu" else (1 << 29)
  matrix = jax.random.uniform(jax.random.key(0), (side, side), dtype)
  array = jnp.zeros(count, dtype)
  product = jax.jit(lambda a: jnp.dot(a, a))
  copy = jax.jit(lambda a: a + 1)
  functions = {"dense": lambda: product(matrix), "copy": lambda: copy(array)}
  for function in functions.values():
    jax.block_until_ready(function())
  seconds = {name: timing.minimum for name, timing in measure(functions, 5).items()}
  dense_rate, copy_rate = 2 * side**3 / seconds["dense"], 2 * array.nbytes / seconds["copy"]
  return Machine(platform, jax.devices()[0].device_kind, threads(), dense_rate, copy_rate)


def header(machine: Machine, dtype: str) -> str:
  date = datetime.date.today().isoformat()
  return (
    f"{machine.kind} ({machine.platform}), {machine.threads} threads, jax {jax.__version__}, {dtype}, {date}; "
    f"dense product {machine.dense_rate / 1e9:.4g} GFLOP/s, copy {machine.copy_rate / 1e9:.4g} GB/s (read + written)"
  )


def free_bytes() -> float:
  """Memory that is left for arrays: the accelerator's, or the host's. Infinite where it cannot be told."""
  statistics = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" in statistics:
    return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
  try:
    with open("/proc/meminfo") as lines:
      available = next(line for line in lines if line.startswith("MemAvailable"))
    return 1024.0 * int(available.split()[1])
  except (OSError, StopIteration):
    return float("inf")
