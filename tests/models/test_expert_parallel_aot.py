"""The expert exchange of a real layer, compiled for TPUs on a machine without one, in a process of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HAS_LIBTPU = (pathlib.Path(sys.prefix) / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None
TOKENS, TOP_K, HIDDEN, INNER, EXPERTS = 4096, 8, 2048, 768, 128  # a chip's tokens; Qwen3-30B-A3B's layer

pytestmark = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed; `make test-tpu-aot` installs it")


def compile_layer(topology: str, expert: int, capacity: float) -> dict[str, float]:
  """Forward and backward of the layer's experts; runs in the child."""
  from zeda_jax.plan.aot import find_libtpu

  find_libtpu()
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import NamedSharding, PartitionSpec

  from zeda_jax.models.expert_parallel import parallel_experts
  from zeda_jax.sharding import Sharding, make_mesh

  chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  sharding = Sharding(make_mesh(expert=expert, num_experts=EXPERTS, devices=chips), capacity=capacity)
  rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.rules.tokens))
  tokens = TOKENS * sharding.num_devices

  def shape(size, where=rows, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(size, dtype, sharding=where)

  def matrix(*size):
    return shape(size, sharding.parameter(("experts",), size))

  def run(x, picks, weights, gate_up, down, grad):
    experts = lambda *floats: parallel_experts(floats[0], picks, *floats[1:], sharding)
    out, pullback, exchange = jax.vjp(experts, x, weights, gate_up, down, has_aux=True)
    return out, pullback(grad), exchange

  x, weights = shape((tokens, HIDDEN)), shape((tokens, TOP_K), dtype=jnp.float32)
  matrices = matrix(EXPERTS, HIDDEN, 2 * INNER), matrix(EXPERTS, INNER, HIDDEN)
  picks = shape((tokens, TOP_K), dtype=jnp.int32)
  compiled = jax.jit(run).lower(x, picks, weights, *matrices, x).compile()
  program, memory = compiled.as_text(), compiled.memory_analysis()
  return {
    "ragged": program.count(" ragged-all-to-all"),
    "kernels": program.count('custom_call_target="tpu_custom_call"'),
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
  }


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology, expert", [("v5p:2x2x1", 4), ("v5e:4x4", 4)])
def test_rows_travel_by_ragged_exchange_and_memory_follows_the_capacity(topology, expert):
  from zeda_jax.plan.aot import ENVIRONMENT

  found = {}
  for capacity in (1.25, 0.625):
    code = f"""
import json
from tests.models.test_expert_parallel_aot import compile_layer
print(json.dumps(compile_layer({topology!r}, {expert}, {capacity})))
"""
    env = os.environ | ENVIRONMENT
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    found[capacity] = json.loads(child.stdout.splitlines()[-1])
    # Forward there and back, backward there twice and back, each in the first round and in the loop of further ones;
    # without remat the compiler sees that the first round's tokens travel twice, and sends them once.
    assert found[capacity]["ragged"] >= 9, found
    assert found[capacity]["kernels"] > 0, found
  fewer_rows = TOKENS * TOP_K * (1.25 - 0.625)
  assert found[1.25]["temporaries"] - found[0.625]["temporaries"] > 2 * fewer_rows * HIDDEN * 2, found
