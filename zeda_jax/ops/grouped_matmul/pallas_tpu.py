"""Grouped matmul as Mosaic kernels for TPUs.

The rows are cut into blocks that start at multiples of block_m, as TPU memory wants it, so a block may hold the rows
of several groups. The kernels walk a list of visits (`Visits`): every pair of a group and a block in which it has rows,
in order. Its length is the length of the grid, known only at run time: rows past sum(group_sizes) and empty groups make
no visit that multiplies. Within a visit only the sub_m-row parts of the block that hold rows of the group are
multiplied, so blocks can be large (few grid steps, little traffic) and waste small.

The list reaches the kernels as prefetched scalars, from which the index maps tell the pipeline what to fetch next; a
block index that does not change is not fetched again: neighbouring visits of one group share its matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from zeda_jax.ops.grouped_matmul import activation
from zeda_jax.ops.grouped_matmul.tpu_tiles import VMEM_LIMIT, Tiles, product_tiles, weight_product_tiles
from zeda_jax.ops.varying import out_struct


class Visits(NamedTuple):
  """What each step along the grid's row axis works on; entries past `length` mean nothing.

  Attributes:
    length: number of visits.
    group: whose matrix is used.
    fetch: row block that is read.
    store: row block that is written.
    start: first row of the group, absolute.
    end: one past its last row; equal to `start` where the visit has nothing to multiply.
  """

  length: Int[Array, ""]
  group: Int[Array, " V"]
  fetch: Int[Array, " V"]
  store: Int[Array, " V"]
  start: Int[Array, " V"]
  end: Int[Array, " V"]


NUM_SCALARS = len(Visits._fields)


def make_visits(
  group_sizes: Int[Array, " G"], num_rows: int, block_m: int, *, empty_groups: bool = False, dead_blocks: bool = False
) -> Visits:
  """The visits for rows in blocks of block_m.

  Args:
    group_sizes: rows per group, with a sum of at most num_rows.
    num_rows: M.
    block_m: rows of a block.
    empty_groups: give each empty group one visit that multiplies nothing, so that its result is written.
    dead_blocks: the same for each row block without a live row. Such a visit fetches what the one before it fetched.
  """
  num_groups, num_blocks = group_sizes.shape[0], pl.cdiv(num_rows, block_m)
  ends = jnp.cumsum(group_sizes)
  starts = ends - group_sizes
  first = jnp.minimum(starts // block_m, num_blocks - 1)
  counts = jnp.where(group_sizes > 0, (ends - 1) // block_m - first + 1, int(empty_groups))
  # The blocks past the live rows are those of one more group, which has no rows.
  live_blocks = pl.cdiv(ends[-1], block_m)
  first = jnp.append(first, live_blocks)
  counts = jnp.append(counts, num_blocks - live_blocks if dead_blocks else 0)
  starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, ends[-1])

  visit_ends = jnp.cumsum(counts)
  visits = jnp.arange(num_blocks + num_groups, dtype=jnp.int32)
  # group[v] = the group whose range of visits holds v; equals repeat(arange(G + 1), counts).
  group = jnp.searchsorted(visit_ends, visits, side="right", method="compare_all").astype(jnp.int32)
  group = jnp.minimum(group, num_groups)
  store = first[group] + visits - (visit_ends - counts)[group]
  last_live_group = jnp.max(jnp.where(group_sizes > 0, jnp.arange(num_groups), 0))
  return Visits(
    visit_ends[-1],
    jnp.where(group == num_groups, last_live_group, group),
    jnp.minimum(store, jnp.maximum(live_blocks - 1, 0)),
    store,
    starts[group],
    ends[group],
  )


def _parts(visits: Visits, visit: Array, block: Array, tiles: Tiles) -> tuple[Array, Array, Callable[[Array], Any]]:
  """(first, end) of the sub_m-row parts of a block that hold rows of the visit's group, and a function from a part to
  (its rows within the block, True [sub_m, 1] for those of the group)."""
  offset = block * tiles.block_m
  start, end = visits.start[visit] - offset, visits.end[visit] - offset
  # lax.div truncates; `//` would ask for the sign, whose lowering wants to know the chip, even ahead of time.
  first = jax.lax.div(jnp.maximum(start, 0), tiles.sub_m)
  last = jax.lax.div(jnp.minimum(end, tiles.block_m) + tiles.sub_m - 1, tiles.sub_m)
  last = jnp.where(end > start, last, first)

  def part(index: Array) -> tuple[Any, Array]:
    at = pl.multiple_of(index * tiles.sub_m, tiles.sub_m)
    rows = at + jax.lax.broadcasted_iota(jnp.int32, (tiles.sub_m, 1), 0)
    return pl.ds(at, tiles.sub_m), (rows >= start) & (rows < end)

  return first, last, part


def _keep_first(x: Array, axis: int, length: Array | int) -> Array:
  """x with 0 from index `length` of `axis` on: the padding of an array's last block holds anything, NaN included."""
  return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < length, x, 0)


def _product_kernel(*refs, tiles: Tiles, size_k: int, transpose_rhs: bool, precision, epilogue):
  """One visit: out[rows of the group] = epilogue(lhs @ rhs[group] for each of the matrices)."""
  scalars, (lhs, *rhs, out, totals) = refs[:NUM_SCALARS], refs[NUM_SCALARS:]
  visits = Visits(*scalars)
  visit, step_k = pl.program_id(1), pl.program_id(2)
  num_k = pl.cdiv(size_k, tiles.block_k)
  first, last, part = _parts(visits, visit, visits.store[visit], tiles)

  @pl.when((step_k == 0) & ((visit == 0) | (visits.store[visit] != visits.store[jnp.maximum(visit - 1, 0)])))
  def _():  # the block's first visit: what no visit writes is 0
    out[...] = jnp.zeros_like(out)

  @pl.loop(first, last)
  def _(index):
    rows, mine = part(index)
    left = lhs[rows, :]
    for i, ref in enumerate(rhs):
      right = ref[0]
      if size_k % tiles.block_k:
        left = _keep_first(left, 1, size_k - step_k * tiles.block_k)
        right = _keep_first(right, int(transpose_rhs), size_k - step_k * tiles.block_k)
      contract = ((1,), (int(transpose_rhs),))
      product = jax.lax.dot_general(
        left, right, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
      )
      if num_k > 1:
        totals[i, rows, :] = jnp.where(step_k == 0, product, totals[i, rows, :] + product)
      else:
        totals[i, rows, :] = product

    @pl.when(step_k == num_k - 1)
    def _():
      result = epilogue(*(totals[i, rows, :] for i in range(len(rhs))))
      out[rows, :] = jnp.where(mine, result, out[rows, :])


def _call_product(
  lhs, rhs, group_sizes, *, size_n, num_rhs, transpose_rhs, precision, dtype, epilogue, tiles, interpret
) -> Array:
  """Runs _product_kernel; with num_rhs matrices, the i-th takes columns i * size_n ... of rhs."""
  (size_m, size_k), num_groups = lhs.shape, rhs.shape[0]
  tiles = tiles or product_tiles(size_m, size_k, size_n, num_groups, lhs.dtype, dtype, num_rhs)
  visits = make_visits(group_sizes, size_m, tiles.block_m, dead_blocks=True)
  num_k, num_n = pl.cdiv(size_k, tiles.block_k), pl.cdiv(size_n, tiles.block_n)

  def block_k(v, k, visits):  # a visit without rows stays at the block that is there already
    return jnp.where(visits.end[v] > visits.start[v], k, num_k - 1)

  def lhs_index(n, v, k, *scalars):
    visits = Visits(*scalars)
    return visits.fetch[v], block_k(v, k, visits)

  def rhs_index(i, n, v, k, *scalars):
    visits = Visits(*scalars)
    row, column = block_k(v, k, visits), i * num_n + n
    return (visits.group[v], column, row) if transpose_rhs else (visits.group[v], row, column)

  def out_index(n, v, k, *scalars):
    return Visits(*scalars).store[v], n

  rhs_block = (1, tiles.block_n, tiles.block_k) if transpose_rhs else (1, tiles.block_k, tiles.block_n)
  kernel = functools.partial(
    _product_kernel,
    tiles=tiles,
    size_k=size_k,
    transpose_rhs=transpose_rhs,
    precision=_precision(precision, lhs.dtype),
    epilogue=epilogue,
  )
  return pl.pallas_call(
    kernel,
    out_shape=out_struct((size_m, size_n), dtype, like=lhs),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=NUM_SCALARS,
      grid=(num_n, visits.length, num_k),
      in_specs=[
        pl.BlockSpec((tiles.block_m, tiles.block_k), lhs_index),
        *(pl.BlockSpec(rhs_block, functools.partial(rhs_index, i)) for i in range(num_rhs)),
      ],
      out_specs=pl.BlockSpec((tiles.block_m, tiles.block_n), out_index),
      scratch_shapes=[pltpu.VMEM((num_rhs, tiles.block_m, tiles.block_n), jnp.float32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    ),
    cost_estimate=_cost(size_m, size_k, num_rhs * size_n, num_groups, lhs.dtype, dtype),
    interpret=interpret,
    name="grouped_matmul" if num_rhs == 1 else "grouped_swiglu",
  )(*_scalars(visits), lhs, *[rhs] * num_rhs)


def _scalars(visits: Visits) -> list[Array]:
  return [visits.length[None], *visits[1:]]


def _precision(precision: Any, dtype: jnp.dtype) -> Any:
  """Products of bfloat16 are exact in fp32; only wider operands have a precision to choose."""
  return None if dtype == jnp.bfloat16 else precision


def _cost(size_m, size_k, size_n, num_groups, dtype, out_dtype) -> pl.CostEstimate:
  """If all rows are live: each is multiplied once, and each matrix read once."""
  itemsize = jnp.dtype(dtype).itemsize
  return pl.CostEstimate(
    flops=2 * size_m * size_k * size_n,
    transcendentals=0,
    bytes_accessed=(size_m * size_k + num_groups * size_k * size_n) * itemsize
    + size_m * size_n * jnp.dtype(out_dtype).itemsize,
  )


def product(
  lhs: Float[Array, "M K"],
  rhs: Array,
  group_sizes: Int[Array, " G"],
  *,
  transpose_rhs: bool,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
  tiles: Tiles | None = None,
  interpret: Any = False,
) -> Float[Array, "M N"]:
  """See `api.Backend`. `tiles` overrides the model in tpu_tiles; `interpret` is pallas_call's."""
  return _call_product(
    lhs,
    rhs,
    group_sizes,
    size_n=rhs.shape[1 if transpose_rhs else 2],
    num_rhs=1,
    transpose_rhs=transpose_rhs,
    precision=precision,
    dtype=dtype,
    epilogue=lambda total: total.astype(dtype),
    tiles=tiles,
    interpret=interpret,
  )


def swiglu(
  lhs: Float[Array, "M K"],
  gate_up: Float[Array, "G K 2F"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
  tiles: Tiles | None = None,
  interpret: Any = False,
) -> Float[Array, "M F"]:
  """See `api.Backend`. gate and up are two blocks of the same array, so the [M, 2F] product never leaves the chip's
  vector memory. Widths that are no multiple of a lane tile (128) cannot be cut that way and take two steps."""
  size_n = gate_up.shape[2] // 2
  options: dict[str, Any] = {"precision": precision, "dtype": dtype, "tiles": tiles, "interpret": interpret}
  if size_n % 128:
    return activation.swiglu_halves(product(lhs, gate_up, group_sizes, transpose_rhs=False, **options))
  epilogue = functools.partial(activation.swiglu, dtype=dtype)
  return _call_product(
    lhs, gate_up, group_sizes, size_n=size_n, num_rhs=2, transpose_rhs=False, epilogue=epilogue, **options
  )


def _weight_product_kernel(*refs, tiles: Tiles, precision):
  """One visit: total += lhs[rows of the group].T @ grad[rows of the group]; written at the group's last visit."""
  scalars, (lhs, grad, out, total) = refs[:NUM_SCALARS], refs[NUM_SCALARS:]
  visits, visit = Visits(*scalars), pl.program_id(2)
  group = visits.group
  first, last, part = _parts(visits, visit, visits.fetch[visit], tiles)

  @pl.when((visit == 0) | (group[visit] != group[jnp.maximum(visit - 1, 0)]))
  def _():
    total[...] = jnp.zeros_like(total)

  @pl.loop(first, last)
  def _(index):
    rows, mine = part(index)
    # Both sides are masked: 0 * NaN of an unused row would be NaN.
    left, right = jnp.where(mine, lhs[rows, :], 0), jnp.where(mine, grad[rows, :], 0)
    total[...] += jax.lax.dot_general(
      left, right, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )

  is_last = visit == visits.length[0] - 1

  @pl.when(is_last | (group[jnp.where(is_last, visit, visit + 1)] != group[visit]))
  def _():
    out[0] = total[...].astype(out.dtype)


def weight_product(
  lhs: Float[Array, "M K"],
  grad: Float[Array, "M N"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
  tiles: Tiles | None = None,
  interpret: Any = False,
) -> Float[Array, "G K N"]:
  """See `api.Backend`. `tiles` overrides the model in tpu_tiles; `interpret` is pallas_call's."""
  (size_m, size_k), size_n, num_groups = lhs.shape, grad.shape[1], group_sizes.shape[0]
  tiles = tiles or weight_product_tiles(size_m, size_k, size_n, num_groups, lhs.dtype, dtype)
  visits = make_visits(group_sizes, size_m, tiles.block_m, empty_groups=True)
  block_k, block_n = tiles.block_k, tiles.block_n
  return pl.pallas_call(
    functools.partial(_weight_product_kernel, tiles=tiles, precision=_precision(precision, lhs.dtype)),
    out_shape=out_struct((num_groups, size_k, size_n), dtype, like=lhs),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=NUM_SCALARS,
      grid=(pl.cdiv(size_k, block_k), pl.cdiv(size_n, block_n), visits.length),
      in_specs=[
        pl.BlockSpec((tiles.block_m, block_k), lambda k, n, v, *scalars: (Visits(*scalars).fetch[v], k)),
        pl.BlockSpec((tiles.block_m, block_n), lambda k, n, v, *scalars: (Visits(*scalars).fetch[v], n)),
      ],
      out_specs=pl.BlockSpec((1, block_k, block_n), lambda k, n, v, *scalars: (Visits(*scalars).group[v], k, n)),
      scratch_shapes=[pltpu.VMEM((block_k, block_n), jnp.float32)],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    ),
    cost_estimate=_cost(size_m, size_k, size_n, num_groups, lhs.dtype, dtype),
    interpret=interpret,
    name="grouped_weight_product",
  )(*_scalars(visits), lhs, grad)
