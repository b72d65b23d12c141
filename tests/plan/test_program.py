"""Collectives counted in optimized HLO: written by hand, and compiled for eight devices in a process of its own."""

import pytest

from tests.multiprocess import run_everywhere
from zeda_jax.plan.program import Sent, sent

MB = 2**20
# 48 layers with a gather over 16 devices and a scatter inside a fusion; an exchange in a loop that makes no round.
PROGRAM = """
HloModule jit_step

%all-reduce-scatter.1 (p: f32[1024,256]) -> f32[64,256] {
  %p = f32[1024,256]{1,0} parameter(0)
  %all-reduce.7 = f32[1024,256]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %s = f32[64,256]{1,0} dynamic-slice(%all-reduce.7, %i, %j), dynamic_slice_sizes={64,256}
}

%rounds_body (t: (s32[])) -> (s32[]) {
  %x = bf16[1024,512]{1,0} ragged-all-to-all(%a, %b, %c), replica_groups={{0,1,2,3},{4,5,6,7}}
}

%rounds_condition (t: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%layer (t: (s32[])) -> (s32[]) {
  %g = bf16[1024,512]{1,0} all-gather(%w), replica_groups=mesh['a'=16,'b'=4] {'a'}, dimensions={0}, barrier={"x":
{}}, use_global_device_ids=true
  %r = bf16[1280,512]{1,0} ragged-all-to-all(%a, %b, %c), replica_groups=[16,4]<=[64]
  %f = f32[64,256]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %w2 = (s32[]) while(%t), condition=%rounds_condition, body=%rounds_body, metadata={op_name="further_rounds/while"}
}

%layers (t: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(48)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w1 = (s32[]) while(%t), condition=%layers, body=%layer, metadata={op_name="jit(step)/while"}
  ROOT %sum = f32[262144]{0} all-reduce(%g), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_loops_fusions_and_groups():
  assert sent(PROGRAM, exchange_capacity=1.25) == [
    Sent("all-gather", 16, 48 * MB * 15 / 16),
    Sent("all-reduce", 2, 2 * MB / 2),
    Sent("ragged-all-to-all", 4, 48 * MB * 3 / 4),
    Sent("reduce-scatter", 4, 48 * MB * 3 / 4),
  ]


def check_compiled():
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from zeda_jax.sharding import gather, make_mesh

  mesh, spec = make_mesh(4, 2), PartitionSpec(("data", "expert"))

  def on_device(x, w):
    body = lambda x, w: (jnp.tanh(x @ gather(w, PartitionSpec("data"))), None)
    return jax.lax.scan(body, x, w)[0]

  shape = lambda size, spec: jax.ShapeDtypeStruct(size, jnp.float32, sharding=NamedSharding(mesh, spec))
  layers = PartitionSpec(None, "data")
  step = jax.shard_map(on_device, mesh=mesh, in_specs=(spec, layers), out_specs=spec)
  loss = jax.jit(jax.grad(lambda w, x: step(x, w).sum()))
  text = loss.lower(shape((5, 64, 64), layers), shape((16, 64), spec)).compile().as_text()
  found = {(s.kind, s.group): s.bytes for s in sent(text)}
  matrix = 64 * 64 * 4
  # Forward and backward gather every layer; the gradients are summed over "data" and stay cut.
  assert found["all-gather", 4] in (5 * matrix * 3 / 4, 10 * matrix * 3 / 4), found
  assert found["reduce-scatter", 4] == 5 * matrix * 3 / 4, found


def test_a_compiled_scan():
  run_everywhere("tests.plan.test_program:check_compiled", 1, 8)


def test_a_collective_outside_any_loop_counts_once():
  line = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %x = f32[4,256]{1,0} OP(%p), replica_groups={{0,1,2,3}}\n}\n"
  sizes = {"all-gather": 3072, "reduce-scatter": 12288, "all-to-all": 3072, "collective-permute": 4096}
  for kind, size in sizes.items():
    (found,) = sent(line.replace("OP", kind))
    assert (found.kind, found.bytes) == (kind, pytest.approx(size))
