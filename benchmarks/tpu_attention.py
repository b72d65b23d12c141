"""Attention over long packed rows compiled for TPUs, on a machine without one: forward and backward, and its memory.

  python benchmarks/tpu_attention.py --topologies v5p:2x2x1 --lengths 32768    # prints a table

One row a chip; on several chips, as one program over a mesh of them. Needs libtpu, as benchmarks/tpu_aot.py does. Only
compiled: no time is measured.
"""

import argparse
import json
import math
import os
import sys
from typing import Any

from zeda_jax.plan.aot import ENVIRONMENT, find_libtpu

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

# query heads, key/value heads, width of queries and keys, width of values
MODELS = {"qwen3_30b_a3b": (32, 4, 128, 128), "glm_4_7_flash": (20, 20, 256, 256)}


def compile_one(topology: str, model: str, length: int, devices: int) -> dict[str, Any]:
  """Bytes of one chip's operands and temporaries, and the number of kernels, of a forward and backward pass."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import topologies
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  from zeda_jax.ops.attention import attention

  chips = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:devices])
  mesh = Mesh(chips, ("data",), axis_types=(AxisType.Auto,))
  heads, shared, width, value_width = MODELS[model]

  def shape(*tail: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return jax.ShapeDtypeStruct((devices, length, *tail), dtype, sharding=rows)

  def run(query, key, value, segments, grad):
    out, pullback = jax.vjp(lambda *qkv: attention(*qkv, segments), query, key, value)
    return out, *pullback(grad)

  operands = (shape(heads, width), shape(shared, width), shape(shared, value_width), shape(dtype=jnp.int32))
  operands += (shape(heads, value_width),)
  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(*operands).compile()
  text = compiled.as_text()
  return {
    "operand_bytes": sum(math.prod(o.shape) * o.dtype.itemsize for o in operands) // devices,
    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
  parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
  parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768])
  parser.add_argument("--devices", nargs="+", type=int, default=[1])
  parser.add_argument("--json", action="store_true", help="print the records instead of the table")
  flags = parser.parse_args()
  os.environ.update(ENVIRONMENT)
  if not find_libtpu():
    sys.exit("libtpu is not installed: run `make test-tpu-aot`, or pip install 'zeda-jax[tpu-aot]'.")
  records = []
  for topology in flags.topologies:
    for model in flags.models:
      for length in flags.lengths:
        for devices in flags.devices:
          record: dict[str, Any] = {"topology": topology, "model": model, "length": length, "devices": devices}
          try:
            record |= compile_one(topology, model, length, devices)
          except Exception as error:  # what does not compile is a result, too
            record["error"] = str(error)[:500]
          records.append(record)
  print(json.dumps(records) if flags.json else table(records))


def table(records: list[dict[str, Any]]) -> str:
  """The records as Markdown."""
  lines = ["| chip | model | tokens a row | chips | operands, MB | temporaries, MB |", "|" + "---|" * 6]
  for r in records:
    head = f"| {r['topology'].split(':')[0]} | {r['model']} | {r['length']} | {r['devices']} |"
    if "error" in r:
      lines.append(f"{head} does not compile: {r['error'].splitlines()[0]} | |")
    else:
      lines.append(f"{head} {r['operand_bytes'] / 1e6:.0f} | {r['temporary_bytes'] / 1e6:.0f} |")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
