"""The grouped products compiled for TPUs, on a machine without one: FLOPs and temporaries of each backend.

  make test-tpu-aot                                      # installs libtpu and runs the tests of this
  python benchmarks/tpu_aot.py --topologies v5p:2x2x1    # prints a table

Needs libtpu: in the environment (extra `tpu-aot`), or in <environment>/libtpu, where make puts it, so that programs on
the CPU do not look for a TPU. FLOPs of the Pallas kernels are what they tell XLA they need if all rows are live (a
custom call has no others); those of the other columns are counted by XLA. Only compiled: no time is measured.
"""

import argparse
import json
import os
import sys
import time
from typing import Any

from zeda_jax.bench import shapes as bench
from zeda_jax.plan.aot import ENVIRONMENT, find_libtpu

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
SHAPES = {
  "qwen3_30b_a3b": bench.SHAPES["qwen3-30b-a3b/prefill"],
  "glm_4_7_flash": bench.SHAPES["glm-4.7-flash/prefill"],
  "qwen3_30b_a3b decode": bench.SHAPES["qwen3-30b-a3b/decode-32"],
}
MEGABLOX_TILE = (512, 1024, 768)  # compiles everywhere; fewer rows where there are fewer


def programs(backend: str, rows: int, inner: int, columns: int, groups: int) -> dict[str, tuple[Any, list[Any]]]:
  """name -> (function, its argument shapes): the product forward, forward and backward; SwiGLU where it is fused."""
  import jax
  import jax.numpy as jnp
  from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

  from zeda_jax import grouped_matmul
  from zeda_jax.ops.grouped_matmul import grouped_swiglu

  def forward(lhs, rhs, sizes):
    if backend == "megablox":
      return megablox.gmm(lhs, rhs, sizes, lhs.dtype, (min(rows, MEGABLOX_TILE[0]), *MEGABLOX_TILE[1:]))
    if backend == "ragged_dot":
      return jax.lax.ragged_dot(lhs, rhs, sizes)
    return grouped_matmul(lhs, rhs, sizes, backend=None if backend == "default" else backend)

  def forward_and_backward(lhs, rhs, sizes, grad):
    out, pullback = jax.vjp(lambda a, b: forward(a, b, sizes), lhs, rhs)
    return out, pullback(grad)

  def shape(*size, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(size, dtype)

  operands = [shape(rows, inner), shape(groups, inner, columns), shape(groups, dtype=jnp.int32)]
  found = {
    "forward": (forward, operands),
    "forward and backward": (forward_and_backward, [*operands, shape(rows, columns)]),
  }
  if backend == "default" and columns % 256 == 0:
    found["swiglu"] = (grouped_swiglu, operands)
  return found


def compile_one(topology: str, function: Any, arguments: list[Any]) -> dict[str, float]:
  """Compiles for one chip of the topology; seconds, FLOPs, temporary bytes and the arguments' bytes."""
  import jax
  from jax.experimental import topologies

  chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  sharding = jax.sharding.SingleDeviceSharding(chip)
  arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*arguments).compile()
  memory = compiled.memory_analysis()
  return {
    "seconds": time.perf_counter() - start,
    "flops": compiled.cost_analysis()["flops"],
    "temporary_bytes": memory.temp_size_in_bytes,
    "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
  }


def measure(topologies: list[str], shapes: list[str], backends: list[str]) -> list[dict[str, Any]]:
  """One record for each compiled program, the useful FLOPs (2 M K N; thrice that with the backward pass) beside it."""
  records = []
  for topology in topologies:
    for shape in shapes:
      layer = SHAPES[shape]
      for product, k, n in (("gate_up", layer.hidden, 2 * layer.inner), ("down", layer.inner, layer.hidden)):
        for backend in backends:
          for name, (function, arguments) in programs(backend, layer.picks, k, n, layer.experts).items():
            if name == "swiglu" and product == "down":
              continue
            useful = 2 * layer.picks * k * n * (3 if name == "forward and backward" else 1)
            record = {"topology": topology, "shape": shape, "product": product, "backend": backend, "program": name}
            try:
              record |= {"useful_flops": useful, **compile_one(topology, function, arguments)}
            except Exception as error:  # a peer that does not compile is a result, too
              record["error"] = str(error).splitlines()[0][:200]
            records.append(record)
            print(json.dumps(record), file=sys.stderr, flush=True)
  return records


def table(records: list[dict[str, Any]]) -> str:
  """The records as Markdown."""
  lines = [
    "| chip | shape | product | program | backend | FLOPs ÷ useful | temporaries, MB | compiled in, s |",
    "|" + "---|" * 8,
  ]
  for r in records:
    head = f"| {r['topology'].split(':')[0]} | {r['shape']} | {r['product']} | {r['program']} | {r['backend']} |"
    if "error" in r:
      lines.append(f"{head} does not compile: {r['error']} | | |")
    else:
      lines.append(
        f"{head} {r['flops'] / r['useful_flops']:.2f} | {r['temporary_bytes'] / 1e6:.1f} | {r['seconds']:.1f} |"
      )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
  parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
  parser.add_argument("--backends", nargs="+", default=["default", "megablox", "ragged_dot"])
  parser.add_argument("--json", action="store_true", help="print the records instead of the table")
  flags = parser.parse_args()
  os.environ.update(ENVIRONMENT)
  if not find_libtpu():
    sys.exit("libtpu is not installed: run `make test-tpu-aot`, or pip install 'zeda-jax[tpu-aot]'.")
  records = measure(flags.topologies, flags.shapes, flags.backends)
  print(json.dumps(records) if flags.json else table(records))


if __name__ == "__main__":
  main()
