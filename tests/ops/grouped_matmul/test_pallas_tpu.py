"""The Mosaic kernels under the TPU interpreter, which finds races and reads of memory that nobody wrote."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter  # its races have no public name
from jax.experimental.pallas import tpu as pltpu

from tests.ops.grouped_matmul.contract import Contract, inputs, oracle, poisoned, swiglu_oracle
from zeda_jax.ops.grouped_matmul import BACKENDS, Backend, grouped_matmul, pallas_tpu, reference
from zeda_jax.ops.grouped_matmul.tpu_tiles import BLOCKS_BUDGET, Tiles, product_tiles, weight_product_tiles

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
# The blocks of a parallel axis can only race on two cores, whose threads make the interpreter slow: for a few tests.
TWO_CORES = dataclasses.replace(INTERPRET, num_cores_or_threads=2)


def interpreted(params):
  kernels = (pallas_tpu.product, pallas_tpu.weight_product, pallas_tpu.swiglu)
  return [functools.partial(kernel, interpret=params) for kernel in kernels]


FUNCTIONS = interpreted(TWO_CORES)


@pytest.fixture(scope="module", autouse=True)
def interpreted_backend():
  BACKENDS["pallas_tpu_interpreted"] = Backend(*interpreted(INTERPRET))
  yield
  del BACKENDS["pallas_tpu_interpreted"]


@pytest.fixture(autouse=True)
def no_races():
  yield
  races = interpreter.races
  assert races is None or not races.races_found


class TestPallasTpu(Contract):
  backend = "pallas_tpu_interpreted"

  @pytest.mark.parametrize("check_vma", [False])  # the interpreter itself does not pass the check; see the next test
  def test_inside_shard_map(self, check_vma):
    super().test_inside_shard_map(check_vma)


def value_and_gradients(backend):
  def run(lhs, rhs, sizes, grad):
    out, pullback = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, backend=backend), lhs, rhs)
    return out, *pullback(grad)

  return run


@pytest.mark.parametrize("backend", [None, "pallas_tpu"])
@pytest.mark.parametrize("sharded", [False, True])
def test_programs_lowered_for_tpus_take_the_kernels_on_any_host(backend, sharded):
  run = value_and_gradients(backend)
  if sharded:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    specs = {"in_specs": (rows, whole, whole, rows), "out_specs": (rows, rows, whole)}
    run = jax.shard_map(run, mesh=mesh, check_vma=True, **specs)
  lhs, rhs, grad = inputs((512, 256, 384, 4), jnp.bfloat16)
  program = jax.jit(run).trace(lhs, rhs, jnp.zeros(4, jnp.int32), grad).lower(lowering_platforms=("tpu",)).as_text()
  assert program.count("tpu_custom_call") == 3
  assert "dot_general" not in program and "ragged_dot" not in program


def plain_visits(sizes, num_rows, block_m, empty_groups, dead_blocks):
  """(group, stored block, start, end) of every visit."""
  found, start = [], 0
  num_blocks = -(-num_rows // block_m)
  for group, size in enumerate(sizes):
    end = start + size
    if size:
      found += [(group, block, start, end) for block in range(start // block_m, (end - 1) // block_m + 1)]
    elif empty_groups:
      found.append((group, min(start // block_m, num_blocks - 1), start, end))
    start = end
  last = max((group for group, size in enumerate(sizes) if size), default=0)
  if dead_blocks:
    found += [(last, block, start, start) for block in range(-(-start // block_m), num_blocks)]
  return found


make_visits = jax.jit(pallas_tpu.make_visits, static_argnums=(1, 2), static_argnames=("empty_groups", "dead_blocks"))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  cuts=st.lists(st.integers(0, 100), min_size=5, max_size=5),
  block_m=st.sampled_from([8, 64, 100]),
  flags=st.sampled_from([{}, {"empty_groups": True}, {"dead_blocks": True}]),
)
def test_the_visits_are_the_pairs_of_group_and_block(cuts, block_m, flags):
  sizes = np.diff([0, *sorted(cuts)])
  visits = make_visits(jnp.asarray(sizes), 100, block_m, **flags)
  expected = plain_visits(sizes, 100, block_m, flags.get("empty_groups"), flags.get("dead_blocks"))
  count = int(visits.length)
  assert count == len(expected) <= visits.group.shape[0]
  columns = (visits.group, visits.store, visits.start, visits.end)
  assert list(zip(*(np.asarray(column)[:count].tolist() for column in columns), strict=True)) == expected
  fetched = np.asarray(visits.fetch)[:count]
  last_live_block = max(-(-int(sizes.sum()) // block_m) - 1, 0)
  np.testing.assert_array_equal(fetched, np.minimum(np.asarray(visits.store)[:count], last_live_block))


@pytest.mark.parametrize("tiles", [Tiles(64, 16, 128, 128), Tiles(32, 32, 128, 256)], ids=str)
def test_blocks_that_do_not_divide_the_axes(tiles):
  """K and N of 300 in blocks of 128: the padding of the last block holds NaN here, and anything on a chip."""
  lhs, rhs, grad = inputs((100, 300, 300, 3))
  sizes = [37, 0, 41]
  out, d_lhs, d_rhs = oracle(lhs, rhs, sizes, grad)
  arguments = poisoned(lhs, 78), rhs, jnp.array(sizes)
  options = {"precision": None, "dtype": jnp.float32, "tiles": tiles}
  product, weight_product, _ = FUNCTIONS
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  close(jax.jit(functools.partial(product, transpose_rhs=False, **options))(*arguments), out)
  run = jax.jit(functools.partial(product, transpose_rhs=True, **options))
  close(run(poisoned(grad, 78), rhs, jnp.array(sizes)), d_lhs)
  close(jax.jit(functools.partial(weight_product, **options))(arguments[0], poisoned(grad, 78), arguments[2]), d_rhs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fused_swiglu_in_several_blocks(dtype):
  lhs, gate_up, _ = inputs((100, 200, 512, 3), dtype)
  gate_up = gate_up / 8
  sizes = [37, 0, 41]
  run = jax.jit(functools.partial(FUNCTIONS[2], precision=None, dtype=dtype, tiles=Tiles(64, 16, 128, 128)))
  found = run(poisoned(lhs, 78), gate_up, jnp.array(sizes))
  tolerance = 1e-4 if dtype == jnp.float32 else 2**-6  # gate and up are rounded once each, and so is their product
  expected = swiglu_oracle(lhs, gate_up, sizes, np.zeros((100, 256)))[0]
  np.testing.assert_allclose(np.asarray(found, float), expected, rtol=tolerance, atol=tolerance)
  text = str(jax.make_jaxpr(run)(lhs, gate_up, jnp.array(sizes)))
  assert "grouped_swiglu" in text and "100,512" not in text  # the [M, 2F] product is no array of the program


def test_the_multiplied_rows_follow_the_live_rows():
  """The grid's length is the number of visits, and a visit multiplies only the parts that hold its rows."""
  tiles = Tiles(64, 16, 128, 128)
  for sizes in ([100, 0, 28], [0, 0, 0], [16, 16, 16], [1, 1, 1]):
    visits = make_visits(jnp.array(sizes), 256, tiles.block_m, dead_blocks=True)
    parts = 0
    for visit in range(int(visits.length)):
      first, last, _ = pallas_tpu._parts(visits, visit, visits.store[visit], tiles)
      parts += int(last) - int(first)
    starts = np.cumsum([0, *sizes[:-1]])
    assert parts == sum(-(-(s + n) // 16) - s // 16 for s, n in zip(starts, sizes, strict=True) if n)


SHAPES = [
  (tokens * top_k, hidden, width, experts)
  for hidden, inner, experts, top_k in [(2048, 768, 128, 8), (2048, 1536, 64, 4), (96, 48, 16, 4), (5, 7, 3, 1)]
  for tokens in (1, 32, 256, 8192)
  for width in (2 * inner, inner)
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_model_of_tiles_stays_within_its_budget(dtype):
  size = jnp.dtype(dtype).itemsize
  for rows, inner, columns, groups in SHAPES:
    for num_rhs in (1, 2):
      tiles = product_tiles(rows, inner, columns, groups, dtype, dtype, num_rhs)
      check_tiles(tiles, rows, inner, columns)
      assert num_rhs == 1 or columns % tiles.block_n == 0
      moving = tiles.block_m * (tiles.block_k + tiles.block_n) + num_rhs * tiles.block_k * tiles.block_n
      assert 2 * size * moving + 4 * num_rhs * tiles.block_m * tiles.block_n <= BLOCKS_BUDGET
    tiles = weight_product_tiles(rows, inner, columns, groups, dtype, dtype)
    check_tiles(tiles, rows, inner, columns)
    moving = tiles.block_m * (tiles.block_k + tiles.block_n) + tiles.block_k * tiles.block_n
    assert 2 * size * moving + 4 * tiles.block_k * tiles.block_n <= BLOCKS_BUDGET


def check_tiles(tiles, rows, inner, columns):
  assert tiles.block_m % tiles.sub_m == 0 and tiles.block_m <= rows
  assert tiles.sub_m == rows or tiles.sub_m % 16 == 0
  assert tiles.block_k == inner or tiles.block_k % 128 == 0
  assert tiles.block_n == columns or tiles.block_n % 128 == 0


def test_few_rows_per_group_take_small_parts_and_many_take_large_blocks():
  assert product_tiles(8192 * 8, 2048, 1536, 128, jnp.bfloat16, jnp.bfloat16)[:3] == (512, 128, 2048)
  assert product_tiles(32 * 8, 2048, 1536, 128, jnp.bfloat16, jnp.bfloat16)[:3] == (256, 16, 2048)


def test_the_reference_agrees_at_a_shape_of_several_blocks():
  lhs, rhs, _ = inputs((1100, 40, 136, 5))
  sizes = jnp.array([513, 0, 511, 1, 3])
  options = {"transpose_rhs": False, "precision": None, "dtype": jnp.float32}
  found = jax.jit(functools.partial(FUNCTIONS[0], **options))(poisoned(lhs, 1028), rhs, sizes)
  np.testing.assert_allclose(found, reference.product(lhs, rhs, sizes, **options), rtol=1e-4, atol=1e-4)
