"""Grouped matmul for NVIDIA GPUs: three Pallas kernels, compiled through Triton.

Before a launch the rows are cut into tiles of one group each (`row_tiles`). One program computes one tile of the
result, so no two write the same place, nothing is summed across programs, and the order that they run in changes no
bit. Pallas' Triton lowering has neither dynamic grids nor scalar prefetch: the grid has as many programs as any sizes
can need, and one that is left without a tile reads three numbers and returns.

Triton, not Mosaic GPU: Triton's code runs from Ampere on, where Mosaic's matrix products need Hopper or newer, and its
kernels can be interpreted on any machine with the very loads and masks that the GPU executes, so that the contract is
tested without a GPU. JAX 0.11 deprecates this lowering; it is there in every version that this package allows.

Products of bfloat16 run on tensor cores. For float32, precision None is true float32, unless
jax.default_matmul_precision asks for less; DEFAULT and HIGH, when given, mean TF32 as in jax.lax.Precision, and
HIGHEST is true float32. Presets of jax.lax.DotAlgorithmPreset work too. Sums are float32 whatever is given.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import activation
from zeda_jax.ops.varying import out_struct, zeros

# What the operand tiles in flight may take: every GPU from Ampere on gives a block 99 KiB, and on those with 228 KiB
# (Hopper, datacenter Blackwell) two blocks share a multiprocessor.
SHARED_MEMORY = 96 * 1024
# Row tiles that walk through the columns together, see `_swizzled`.
PANEL = 8


class Tiles(NamedTuple):
  """How a kernel cuts its work; blocks are powers of two, at least 16.

  Attributes:
    block_m, block_n, block_k: along rows, N and K. A product sums block_k numbers in a step, a weight product block_m.
    num_warps: of one program.
    num_stages: operand tiles in flight, the one in use included.
  """

  block_m: int
  block_n: int
  block_k: int
  num_warps: int
  num_stages: int


class RowTiles(NamedTuple):
  """Tiles of one group each, in the order of their rows; the last ones need not exist.

  Attributes:
    group: the tile's group; G for the rows past all groups, which become 0.
    first: its first row.
    end: the row at which the group ends (which the tile may not reach). A tile exists if first < end.
  """

  group: Int[Array, " T"]
  first: Int[Array, " T"]
  end: Int[Array, " T"]


def row_tiles(group_sizes: Int[Array, " G"], num_rows: int, block_m: int) -> RowTiles:
  """Tiles of block_m rows that cover rows 0 .. num_rows, each once; T is the most that any sizes need."""
  rest = num_rows - jnp.sum(group_sizes, dtype=jnp.int32)
  sizes = jnp.append(group_sizes, rest)
  counts, ends = pl.cdiv(sizes, block_m), jnp.cumsum(sizes)
  tile_ends = jnp.cumsum(counts)
  filled = min(sizes.shape[0], num_rows)  # each may hold one row in a tile of its own; the others fill whole tiles
  tiles = jnp.arange(filled + (num_rows - filled) // block_m, dtype=jnp.int32)
  # Comparing with every group is one fused XLA operation; a binary search would be a loop of launches.
  group = jnp.sum(tiles[:, None] >= tile_ends[:-1], axis=1, dtype=jnp.int32)
  # Where the rest's tiles go on past its end, first >= end: they do not exist.
  of_group = functools.partial(jnp.take, indices=group, mode="clip")
  first = of_group(ends - sizes - (tile_ends - counts) * block_m) + tiles * block_m
  return RowTiles(group, first, of_group(ends))


def product_tiles(
  num_rows: int, num_groups: int, inner: int, columns: int, dtype: jax.typing.DTypeLike, *, matrices: int = 1
) -> Tiles:
  """Tiles of a product [num_rows, inner] x [num_groups, inner, columns] with `matrices` results (2: gate and up).

  block_m is twice the mean rows of a group, 16 to 128: sizes are uneven, and a group that needs a second tile reads its
  matrix twice, while rows that a tile wastes cost nothing as long as reading the matrix is what takes the time, which
  holds up to a few hundred rows. The sums of all results are 128 columns wide. block_k: see `_depth`.
  """
  block_m = _power_of_two(2 * num_rows // max(num_groups, 1), 128)
  block_n = _power_of_two(columns, 128 // matrices)
  block_k = _power_of_two(inner, _depth(dtype))
  stage = (block_m + matrices * block_n) * block_k * jnp.dtype(dtype).itemsize
  return Tiles(block_m, block_n, block_k, *_warps_and_stages(block_m * block_n * matrices, stage))


def weight_product_tiles(
  num_rows: int, num_groups: int, inner: int, columns: int, dtype: jax.typing.DTypeLike
) -> Tiles:
  """Tiles of a weight product [num_rows, inner] x [num_rows, columns] -> [num_groups, inner, columns].

  The result's tile is as large as registers allow, since each operand is read once per tile of the other side; block_m
  is what a product's block_k is, less where groups are smaller.
  """
  block_m = _power_of_two(num_rows // max(num_groups, 1), _depth(dtype))
  block_n, block_k = _power_of_two(columns, 128), _power_of_two(inner, 128)
  stage = (block_n + block_k) * block_m * jnp.dtype(dtype).itemsize
  return Tiles(block_m, block_n, block_k, *_warps_and_stages(block_n * block_k, stage))


def _power_of_two(size: int, most: int) -> int:
  """The smallest power of two that holds `size`, between 16 (a tensor core's least) and `most`."""
  return min(max(16, 1 << max(size - 1, 0).bit_length()), most)


def _depth(dtype: jax.typing.DTypeLike) -> int:
  """How far one step sums: a cache line of 16-bit numbers.

  True float32 has no tensor core: a thread keeps its rows and columns of the step in registers, and beyond 16 they do
  not fit.
  """
  return 64 if jnp.dtype(dtype).itemsize <= 2 else 16


def _warps_and_stages(results: int, stage_bytes: int) -> tuple[int, int]:
  """Warps such that a thread holds up to 64 sums, in whole groups of four (Hopper's unit); stages that fit, up to 4."""
  return (8 if results > 64 * 128 else 4), min(4, SHARED_MEMORY // stage_bytes)


def product(
  lhs: Float[Array, "M K"],
  rhs: Array,
  group_sizes: Int[Array, " G"],
  *,
  transpose_rhs: bool,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
  tiles: Tiles | None = None,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """See `api.Backend`. `tiles` replaces those of `product_tiles`; `interpret` runs the kernel as plain XLA."""
  columns = rhs.shape[1 if transpose_rhs else 2]
  tiles = tiles or product_tiles(lhs.shape[0], rhs.shape[0], lhs.shape[1], columns, lhs.dtype)
  out = jax.ShapeDtypeStruct((lhs.shape[0], columns), dtype)
  kernel = functools.partial(_product_kernel, transpose_rhs=transpose_rhs)
  return _rows_product(kernel, lhs, rhs, group_sizes, out, precision, tiles, interpret)


def swiglu(
  lhs: Float[Array, "M K"],
  gate_up: Float[Array, "G K 2F"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
  tiles: Tiles | None = None,
  interpret: bool = False,
) -> Float[Array, "M F"]:
  """See `api.Backend`: gate and up of a tile are summed side by side and only the result is written."""
  columns = gate_up.shape[2] // 2
  tiles = tiles or product_tiles(lhs.shape[0], gate_up.shape[0], lhs.shape[1], columns, lhs.dtype, matrices=2)
  out = jax.ShapeDtypeStruct((lhs.shape[0], columns), dtype)
  return _rows_product(_swiglu_kernel, lhs, gate_up, group_sizes, out, precision, tiles, interpret)


def weight_product(
  lhs: Float[Array, "M K"],
  grad: Float[Array, "M N"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
  tiles: Tiles | None = None,
  interpret: bool = False,
) -> Float[Array, "G K N"]:
  """See `api.Backend`. `tiles` replaces those of `weight_product_tiles`; `interpret` runs the kernel as plain XLA."""
  (rows, inner), columns, groups = lhs.shape, grad.shape[1], group_sizes.shape[0]
  tiles = tiles or weight_product_tiles(rows, groups, inner, columns, lhs.dtype)
  ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
  return _launch(
    functools.partial(_weight_product_kernel, tiles=tiles, precision=_precision(precision)),
    (ends - group_sizes, ends, lhs, grad),
    jax.ShapeDtypeStruct((groups, inner, columns), dtype),
    groups * pl.cdiv(inner, tiles.block_k) * pl.cdiv(columns, tiles.block_n),
    2 * rows * inner * columns,
    tiles,
    interpret,
  )


def _rows_product(
  kernel: Callable[..., None],
  lhs: Float[Array, "M K"],
  rhs: Array,
  group_sizes: Int[Array, " G"],
  out: jax.ShapeDtypeStruct,
  precision: jax.lax.PrecisionLike,
  tiles: Tiles,
  interpret: bool,
) -> Float[Array, "M W"]:
  work = row_tiles(group_sizes, lhs.shape[0], tiles.block_m)
  return _launch(
    functools.partial(kernel, tiles=tiles, precision=_precision(precision)),
    (*work, lhs, rhs),
    out,
    work.group.shape[0] * pl.cdiv(out.shape[1], tiles.block_n),
    2 * lhs.shape[0] * rhs.shape[1] * rhs.shape[2],
    tiles,
    interpret,
  )


def _launch(
  kernel: Callable[..., None],
  operands: tuple[Array, ...],
  out: jax.ShapeDtypeStruct,
  programs: int,
  flops: int,
  tiles: Tiles,
  interpret: bool,
) -> Array:
  """Runs `programs` programs of the kernel; the last two operands are matrices, the others say whose rows are where.

  The cost is that of rows which all belong to a group: how many do is known on the device only.
  """
  if any(block < 16 or block & (block - 1) for block in tiles[:3]):
    raise ZedaError(f"grouped_matmul: tiles are {tiles}; expected blocks that are powers of two, at least 16.")
  like = operands[-2]
  if not all(operand.size for operand in operands):
    return zeros(out.shape, out.dtype, like=like)
  moved = sum(x.size * x.dtype.itemsize for x in operands) + out.size * out.dtype.itemsize
  call = pl.pallas_call(
    kernel,
    grid=(programs,),
    out_shape=out_struct(out.shape, out.dtype, like=like),
    compiler_params=triton.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
    cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
    interpret=interpret,
  )
  return call(*operands)


def _precision(precision: jax.lax.PrecisionLike) -> jax.lax.PrecisionLike:
  """The precision to give to a dot: Triton's own default for float32 is TF32, which nobody asked for."""
  unasked = precision is None and jax.default_matmul_precision.value is None
  return jax.lax.Precision.HIGHEST if unasked else precision


class _Span(NamedTuple):
  """`size` consecutive indices of an axis from `start` on. Those from `end` on do not count; None: all count."""

  start: Array
  size: int
  end: Array | int | None


def _block(index: Array, size: int, total: int, offset: int = 0) -> _Span:
  """Block `index` of an axis part that begins at `offset` and has length `total`."""
  return _Span(offset + index * size, size, offset + total if total % size else None)


def _mask(rows: _Span, columns: _Span) -> Bool[Array, "rows columns"] | None:
  mask = None
  for axis, span in enumerate((rows, columns)):
    if span.end is not None:
      counts = jnp.expand_dims(span.start + jnp.arange(span.size) < span.end, 1 - axis)
      counts = jnp.broadcast_to(counts, (rows.size, columns.size))
      mask = counts if mask is None else mask & counts
  return mask


def _load(ref: jax.Ref, rows: _Span, columns: _Span, *lead: Array) -> Float[Array, "rows columns"]:
  """ref[*lead, rows, columns], with 0 for what does not count and is not read."""
  mask = _mask(rows, columns)
  at = ref.at[*lead, pl.ds(rows.start, rows.size), pl.ds(columns.start, columns.size)]
  return triton.load(at, mask=mask, other=None if mask is None else 0)


def _store(ref: jax.Ref, rows: _Span, columns: _Span, value: Array, *lead: Array) -> None:
  """ref[*lead, rows, columns] = value, where that counts."""
  at = ref.at[*lead, pl.ds(rows.start, rows.size), pl.ds(columns.start, columns.size)]
  triton.store(at, value.astype(ref.dtype), mask=_mask(rows, columns))


def _swizzled(index: Array, rows: int, columns: int) -> tuple[Array, Array]:
  """(row, column) of program `index` on a grid of rows x columns.

  Programs that run at the same time form a block of PANEL rows and as many columns as there is room for, so that each
  operand tile in the L2 cache serves many of them, where a plain order would sweep through one operand for each tile
  of the other.
  """
  panel, index = jax.lax.div(index, PANEL * columns), jax.lax.rem(index, PANEL * columns)
  height = jnp.minimum(rows - panel * PANEL, PANEL)
  return panel * PANEL + jax.lax.rem(index, height), jax.lax.div(index, height)


def _rows_kernel(
  work: tuple[jax.Ref, ...],
  lhs_ref: jax.Ref,
  rhs_ref: jax.Ref,
  out_ref: jax.Ref,
  tiles: Tiles,
  precision: jax.lax.PrecisionLike,
  offsets: tuple[int, ...],
  transpose_rhs: bool,
  epilogue: Callable[..., Array],
) -> None:
  """One tile of the result: the epilogue of one sum for each offset, which is where its columns of rhs begin."""
  (num_groups, *_), inner, columns = rhs_ref.shape, lhs_ref.shape[1], out_ref.shape[1]
  tile, column = _swizzled(pl.program_id(0), work[0].shape[0], pl.cdiv(columns, tiles.block_n))
  group, first, end = (ref[tile] for ref in work)

  @pl.when(first < end)
  def one_tile() -> None:
    rows = _Span(first, tiles.block_m, end)
    parts = [_block(column, tiles.block_n, columns, offset) for offset in offsets]

    def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
      depth = _block(i, tiles.block_k, inner)
      left = _load(lhs_ref, rows, depth)
      rights = [_load(rhs_ref, *((part, depth) if transpose_rhs else (depth, part)), group) for part in parts]
      products = [triton.dot(left, right, trans_b=transpose_rhs, precision=precision) for right in rights]
      return tuple(total + product for total, product in zip(sums, products, strict=True))

    # No step for the rows past all groups: they are written 0 and not read. The explicit types matter: Triton's loop
    # refuses bounds of two widths, which is what the lowering makes of plain numbers here.
    steps = jnp.where(group < num_groups, jnp.int32(pl.cdiv(inner, tiles.block_k)), jnp.int32(0))
    nothing = tuple(jnp.zeros((tiles.block_m, tiles.block_n), jnp.float32) for _ in parts)
    sums = jax.lax.fori_loop(0, steps, step, nothing)
    _store(out_ref, rows, _block(column, tiles.block_n, columns), epilogue(*sums))


def _product_kernel(group_ref, first_ref, end_ref, lhs_ref, rhs_ref, out_ref, *, tiles, precision, transpose_rhs):
  _rows_kernel(
    (group_ref, first_ref, end_ref), lhs_ref, rhs_ref, out_ref, tiles, precision,
    offsets=(0,), transpose_rhs=transpose_rhs, epilogue=lambda total: total,
  )  # fmt: skip


def _swiglu_kernel(group_ref, first_ref, end_ref, lhs_ref, rhs_ref, out_ref, *, tiles, precision):
  _rows_kernel(
    (group_ref, first_ref, end_ref), lhs_ref, rhs_ref, out_ref, tiles, precision,
    offsets=(0, out_ref.shape[1]), transpose_rhs=False,
    epilogue=functools.partial(activation.swiglu, dtype=out_ref.dtype),
  )  # fmt: skip


def _weight_product_kernel(start_ref, end_ref, lhs_ref, grad_ref, out_ref, *, tiles, precision):
  """One [block_k, block_n] tile of one group's matrix, summed over its rows."""
  _, inner, columns = out_ref.shape
  down, across = pl.cdiv(inner, tiles.block_k), pl.cdiv(columns, tiles.block_n)
  index = pl.program_id(0)
  group = jax.lax.div(index, down * across)
  k, n = _swizzled(jax.lax.rem(index, down * across), down, across)
  start, end = start_ref[group], end_ref[group]
  left_columns, right_columns = _block(k, tiles.block_k, inner), _block(n, tiles.block_n, columns)

  def step(i: Array, total: Array) -> Array:
    # Both sides are masked: 0 * NaN of another group's or an unused row would be NaN.
    rows = _Span(start + i * tiles.block_m, tiles.block_m, end)
    left, right = _load(lhs_ref, rows, left_columns), _load(grad_ref, rows, right_columns)
    return total + triton.dot(left, right, trans_a=True, precision=precision)

  steps = jax.lax.div(end - start + tiles.block_m - 1, tiles.block_m)
  total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tiles.block_k, tiles.block_n), jnp.float32))
  _store(out_ref, left_columns, right_columns, total, group)
