"""The GPU kernels, interpreted on any machine, and compiled as far as one without a GPU can: to verified Triton IR."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

from tests.ops.grouped_matmul.contract import EXACT, Contract, inputs, oracle, poisoned, swiglu_oracle
from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import BACKENDS, grouped_matmul, grouped_swiglu, pallas_gpu
from zeda_jax.ops.grouped_matmul.api import Backend
from zeda_jax.ops.grouped_matmul.pallas_gpu import Tiles

SMALL = Tiles(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=2)
# (groups, hidden size, gate and up side by side) of a layer's experts.
MODELS = {"Qwen3-30B-A3B": (128, 2048, 2 * 768), "GLM-4.7-Flash": (64, 2048, 2 * 1536)}


@pytest.fixture(autouse=True, scope="module")
def interpreted_backend():
  functions = pallas_gpu.product, pallas_gpu.weight_product, pallas_gpu.swiglu
  BACKENDS["pallas_gpu_interpreted"] = Backend(*(functools.partial(f, interpret=True) for f in functions))
  yield
  del BACKENDS["pallas_gpu_interpreted"]


class TestPallasGpu(Contract):
  backend = "pallas_gpu_interpreted"

  # JAX's interpreter indexes arrays that vary over the mesh with a loop counter that does not, which check_vma=True
  # refuses. The compiled kernel has no such loop: see test_inside_shard_map_with_its_checks below.
  @pytest.mark.parametrize("check_vma", [False])
  def test_inside_shard_map(self, check_vma):
    super().test_inside_shard_map(check_vma)


# What a program is made of.


def plain_row_tiles(sizes, num_rows, block_m):
  tiles, start = [], 0
  for group, size in enumerate([*sizes, num_rows - sum(sizes)]):
    tiles += [(group, first, start + size) for first in range(start, start + size, block_m)]
    start += size
  return tiles


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(cuts=st.lists(st.integers(0, 100), min_size=5, max_size=5), block_m=st.sampled_from([16, 32, 128]))
def test_every_row_is_in_one_tile_of_its_group(cuts, block_m):
  sizes = np.diff([0, *sorted(cuts)])
  found = compiled_row_tiles(jnp.asarray(sizes, jnp.int32), 100, block_m)
  tiles = [(int(g), int(first), int(end)) for g, first, end in zip(*found, strict=True)]
  expected = plain_row_tiles(sizes.tolist(), 100, block_m)
  assert tiles[: len(expected)] == expected
  assert all(first >= end for _, first, end in tiles[len(expected) :])


compiled_row_tiles = jax.jit(pallas_gpu.row_tiles, static_argnums=(1, 2))


@pytest.mark.parametrize(("num_rows", "block_m"), [(1, 2), (2, 2), (7, 2), (8, 3), (9, 4)])
def test_there_are_as_many_tiles_as_the_worst_sizes_need(num_rows, block_m):
  possible = (sizes for sizes in itertools.product(range(num_rows + 1), repeat=3) if sum(sizes) <= num_rows)
  worst = max(len(plain_row_tiles(sizes, num_rows, block_m)) for sizes in possible)
  assert compiled_row_tiles(jnp.zeros(3, jnp.int32), num_rows, block_m).group.shape == (worst,)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (19, 4)])
def test_the_program_order_visits_every_tile_once_and_neighbours_share_columns(rows, columns):
  swizzled = jax.jit(pallas_gpu._swizzled, static_argnums=(1, 2))(jnp.arange(rows * columns), rows, columns)
  order = list(zip(*(places.tolist() for places in swizzled), strict=True))
  assert sorted(order) == list(itertools.product(range(rows), range(columns)))
  assert [row for row, _ in order[: min(rows, pallas_gpu.PANEL)]] == list(range(min(rows, pallas_gpu.PANEL)))


# The tiles.


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
  sizes=st.tuples(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 8192), st.integers(1, 8192)),
  dtype=st.sampled_from([jnp.bfloat16, jnp.float16, jnp.float32]),
)
def test_tiles_are_powers_of_two_and_fit_into_shared_memory(sizes, dtype):
  itemsize = jnp.dtype(dtype).itemsize
  by_product = [(m, pallas_gpu.product_tiles(*sizes, dtype, matrices=m)) for m in (1, 2)]
  for matrices, (block_m, block_n, block_k, num_warps, num_stages) in by_product:
    assert all(block >= 16 and block.bit_count() == 1 for block in (block_m, block_n, block_k))
    assert (block_m + matrices * block_n) * block_k * itemsize * num_stages <= pallas_gpu.SHARED_MEMORY
    assert num_warps in (4, 8) and 2 <= num_stages <= 4
  block_m, block_n, block_k, num_warps, num_stages = pallas_gpu.weight_product_tiles(*sizes, dtype)
  assert all(block >= 16 and block.bit_count() == 1 for block in (block_m, block_n, block_k))
  assert (block_n + block_k) * block_m * itemsize * num_stages <= pallas_gpu.SHARED_MEMORY
  assert num_warps in (4, 8) and 2 <= num_stages <= 4


def test_few_rows_in_a_group_get_small_row_tiles():
  def block_m(tokens):
    return pallas_gpu.product_tiles(8 * tokens, 128, 2048, 768, jnp.bfloat16).block_m

  assert [block_m(tokens) for tokens in (1, 32, 256, 512, 1024, 8192)] == [16, 16, 32, 64, 128, 128]


@functools.partial(jax.jit, static_argnums=4)
def run_all(lhs, rhs, sizes, grad, tiles):
  """(product, transposed product, weight product, swiglu), interpreted, with poisoned rows past all groups."""
  live = jnp.sum(sizes)
  lhs, grad = poisoned(lhs, live), poisoned(grad, live)
  options = {"precision": None, "dtype": jnp.float32, "tiles": tiles, "interpret": True}
  return (
    pallas_gpu.product(lhs, rhs, sizes, transpose_rhs=False, **options),
    pallas_gpu.product(grad, rhs, sizes, transpose_rhs=True, **options),
    pallas_gpu.weight_product(lhs, grad, sizes, **options),
    pallas_gpu.swiglu(lhs, rhs, sizes, **options),
  )


# Several panels of row tiles, several column tiles and several steps, whole and with a rest; uneven blocks.
@pytest.mark.parametrize(
  ("shape", "tiles"),
  [((150, 48, 64, 4), SMALL), ((133, 41, 70, 4), SMALL), ((133, 41, 70, 4), Tiles(32, 64, 32, 8, 3))],
)
def test_any_tiles_give_the_same(shape, tiles):
  lhs, rhs, grad = inputs(shape)
  for sizes in ([90, 0, 17, 20], [0, 0, 1, 0], [16, 16, 33, 68]):
    found = run_all(lhs, rhs, jnp.array(sizes), grad, tiles)
    expected = *oracle(lhs, rhs, sizes, grad), swiglu_oracle(lhs, rhs, sizes, grad[:, : shape[2] // 2])[0]
    for got, want in zip(found, expected, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [8, 48])
def test_tiles_that_triton_cannot_have(block):
  with pytest.raises(ZedaError, match=f"block_n={block}.*powers of two, at least 16"):
    lhs, rhs, grad = inputs((17, 3, 2, 3))
    run_all(lhs, rhs, jnp.array([1, 2, 3]), grad, SMALL._replace(block_n=block))


@pytest.mark.parametrize("shape", [(17, 0, 2, 3), (17, 3, 0, 3)])
def test_matrices_without_elements(shape):
  lhs, rhs, grad = inputs(shape)
  found = run_all(lhs, rhs, jnp.array([3, 0, 4]), grad, None)[:3]
  for got, want in zip(found, oracle(lhs, rhs, [3, 0, 4], grad), strict=True):
    np.testing.assert_allclose(got, want, **EXACT)


# Compiled for a GPU.


def abstract(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def lower_for_cuda(function, *arguments, axes=()):
  # Newer versions of JAX want to be told the device where there is none.
  device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, **PLATFORM)
  types = (jax.sharding.AxisType.Auto,) * len(axes)
  mesh = jax.sharding.AbstractMesh((1,) * len(axes), axes, types, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


PLATFORM = {"platform": "gpu"} if "platform" in jax.sharding.AbstractDevice.__dataclass_fields__ else {}


def triton_kernels(lowered):
  """{name: Triton IR} of the program's kernels, in its order. Reading the IR verifies it, which writing it does not."""
  found = []

  def visit(op):
    attributes = op.operation.attributes
    if "call_target_name" in attributes and "triton" in str(attributes["call_target_name"]):
      config = attributes["mhlo.backend_config"]
      found.append((ir.StringAttr(config["name"]).value, ir.StringAttr(config["ir"]).value_bytes))
    for region in op.operation.regions:
      for block in region:
        for inner in block:
          visit(inner)

  module = lowered.compiler_ir()
  with module.context:
    visit(module.operation)
  context = mlir.make_ir_context()
  triton_dialect.register_dialect(context)
  context.load_all_available_dialects()
  with context:
    return {name: str(ir.Module.parse(code)) for name, code in found}


def forward(lhs, rhs, sizes, **options):
  return grouped_matmul(lhs, rhs, sizes, **options)


def gradients(lhs, rhs, sizes, **options):
  return jax.grad(lambda a, b: forward(a, b, sizes, **options).astype(jnp.float32).sum(), (0, 1))(lhs, rhs)


def fused(lhs, rhs, sizes, **options):
  return grouped_swiglu(lhs, rhs, sizes, **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
  ("function", "dots"),
  [
    (forward, {"_product_kernel": 1}),
    (gradients, {"_product_kernel": 1, "_weight_product_kernel": 1}),
    (fused, {"_swiglu_kernel": 2}),
  ],
)
@pytest.mark.parametrize("tokens", [32, 8192])
def test_the_platform_default_on_cuda_is_these_kernels_and_nothing_dense(function, dots, model, dtype, tokens):
  groups, hidden, width = MODELS[model]
  arguments = abstract(8 * tokens, hidden, dtype=dtype), abstract(groups, hidden, width, dtype=dtype)
  lowered = lower_for_cuda(function, *arguments, abstract(groups, dtype=jnp.int32))
  kernels = triton_kernels(lowered)
  assert {name: code.count("tt.dot") for name, code in kernels.items()} == dots
  assert all(code.count("scf.for") == 1 for code in kernels.values())
  # Nobody asked for TF32, so float32 is float32.
  assert not any("tf32" in code for code in kernels.values())
  # Everything else is the work list: no product, no copy of the matrices, none of the loops of another backend.
  text = lowered.as_text()
  assert not any(f"stablehlo.{op}" in text for op in ("dot_general", "transpose", "while"))


@pytest.mark.parametrize(
  ("precision", "config", "is_tf32"),
  [
    (None, None, False),
    (None, "tensorfloat32", True),
    (None, "highest", False),
    ("highest", "tensorfloat32", False),
    ("tensorfloat32", None, True),
    (jax.lax.Precision.DEFAULT, None, True),
    (jax.lax.Precision.HIGH, None, True),
    (jax.lax.DotAlgorithmPreset.TF32_TF32_F32, None, True),
    (jax.lax.DotAlgorithmPreset.F32_F32_F32, None, False),
  ],
)
def test_float32_is_tf32_where_asked(precision, config, is_tf32):
  arguments = abstract(64, 48, dtype=jnp.float32), abstract(3, 48, 40, dtype=jnp.float32), abstract(3, dtype=jnp.int32)
  with jax.default_matmul_precision(config):
    for function in (gradients, fused):
      for code in triton_kernels(lower_for_cuda(functools.partial(function, precision=precision), *arguments)).values():
        assert ("inputPrecision = tf32" in code) == is_tf32


def test_odd_sizes_compile_too():
  sizes = abstract(3, dtype=jnp.int32)
  for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    arguments = abstract(17, 5, dtype=dtype), abstract(3, 5, 6, dtype=dtype), sizes
    assert len(triton_kernels(lower_for_cuda(gradients, *arguments))) == 2
    assert len(triton_kernels(lower_for_cuda(fused, *arguments))) == 1


def test_arrays_past_4_gib_are_indexed_with_64_bits():
  arguments = abstract(2**21, 2048), abstract(8, 2048, 1536), abstract(8, dtype=jnp.int32)
  for code in triton_kernels(lower_for_cuda(gradients, *arguments)).values():
    assert "xi64>" in code


def test_inside_shard_map_with_its_checks():
  rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
  run = jax.shard_map(gradients, in_specs=(rows, whole, rows), out_specs=(rows, whole), check_vma=True)
  lowered = lower_for_cuda(run, abstract(17, 5), abstract(3, 5, 7), abstract(3, dtype=jnp.int32), axes=("rows",))
  assert set(triton_kernels(lowered)) == {"_product_kernel", "_weight_product_kernel"}


def test_the_cost_is_that_of_a_dense_product_of_the_rows():
  def costs(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "pallas_call":
        yield equation.params["cost_estimate"]
      else:
        for inner in jaxprs_in_params(equation.params):
          yield from costs(inner)

  options = {"precision": None, "dtype": jnp.float32}
  lhs, rhs, sizes, grad = abstract(64, 48), abstract(3, 48, 40), abstract(3, dtype=jnp.int32), abstract(64, 40)
  for function, arguments in (
    (functools.partial(pallas_gpu.product, transpose_rhs=False, **options), (lhs, rhs, sizes)),
    (functools.partial(pallas_gpu.product, transpose_rhs=True, **options), (grad, rhs, sizes)),
    (functools.partial(pallas_gpu.swiglu, **options), (lhs, rhs, sizes)),
    (functools.partial(pallas_gpu.weight_product, **options), (lhs, grad, sizes)),
  ):
    traced = jax.jit(function).trace(*arguments)
    found = list(costs(traced.jaxpr.jaxpr))
    assert [cost.flops for cost in found] == [2 * 64 * 48 * 40]
    assert found[0].bytes_accessed > 2 * (64 * 40 + 3 * 48 * 40)  # bfloat16: the matrices and the narrower side
