"""Grouped matmul in plain XLA: loops over groups and row tiles with dynamic trip counts, on any device.

Each group's rows are cut into large tiles and a rest of small ones, so time follows sum(group_sizes), not M, an empty
group costs nothing but its turn in the loop, and little is wasted on groups that fill no whole tile. Groups of very few
rows are multiplied without a matrix product.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zeda_jax.ops.grouped_matmul.activation import swiglu_halves
from zeda_jax.ops.varying import zeros

# Rows of the tiles: one size as often as it fits, then smaller ones for the rest. Large tiles amortise what a product
# spends on packing its matrix; small ones waste few rows at a group's end. The larger the matrix, the more is spent on
# packing it, so the rest of a large one takes several sizes, each at most once, instead of many of the smallest.
SMALL_MATRIX = 2**20  # numbers
PRODUCT_TILES = {"small": (128, 16), "large": (128, 64, 32, 16, 4)}
# Groups of at most so many rows, as when decoding, multiply and add in tiles of their own: that reads the matrix where
# it lies, while a product wants a slice of it copied first, which is most of the time then.
FEW_ROWS = 8
FEW_TILES = (4, 1)
# With more than one row a group and at most so many, the first rows of all groups are one batched product: a turn of
# the loop costs more than a small product. In float32 only: other types would be converted first, all matrices of them.
BATCHED_ROWS = 32
BATCHED_GROUPS = 32  # fewer of them are soon looped over
# A tile of the weight product also pays for adding a whole [K, N] matrix, so its rest is coarser.
WEIGHT_PRODUCT_TILES = (128, 64, 32)


def _over_tiles(
  tiles: tuple[int, ...],
  num_rows: int,
  start: Int[Array, ""],
  end: Int[Array, ""],
  body: Callable[[Array, Array | None, Array], Array],
  init: Array,
) -> Array:
  """Folds body(rows, mine, carry) over tiles that together cover the rows start .. end once.

  `rows` are the tile's row numbers. `mine` [rows, 1] is None if all of them count, else True for those that do: the
  last tile may reach past `end`, and one that would reach past the array is shifted back to end with it.
  """
  sizes = sorted({min(size, num_rows) for size in tiles}, reverse=True)
  for size in sizes:
    is_rest = size == sizes[-1]
    count = (end - start + (size - 1 if is_rest else 0)) // size

    def step(i: Array, carry: Array, size: int = size, is_rest: bool = is_rest, start: Array = start) -> Array:
      at = start + i * size
      if not is_rest:
        return body(at + jnp.arange(size), None, carry)
      rows = jnp.minimum(at, num_rows - size) + jnp.arange(size)
      return body(rows, ((rows >= at) & (rows < end))[:, None], carry)

    init = jax.lax.fori_loop(0, count, step, init)
    start = start + count * size
  return init


def _over_groups(
  group_sizes: Int[Array, " G"],
  body: Callable[[Array, Array, Array, Array], Array],
  init: Array,
  skip: int | Int[Array, ""] = 0,
) -> Array:
  """Folds body(group, first row, end row, carry) over the groups that have more rows than `skip`, without those."""
  ends = jnp.cumsum(group_sizes)
  rows = jnp.maximum(group_sizes - skip, 0)
  groups = jnp.argsort(rows == 0, stable=True)

  def step(i: Array, carry: Array) -> Array:
    group = groups[i]
    return body(group, ends[group] - rows[group], ends[group], carry)

  return jax.lax.fori_loop(0, jnp.count_nonzero(rows), step, init)


def _batched(
  lhs: Float[Array, "M K"],
  rhs: Float[Array, "G K N"],
  group_sizes: Int[Array, " G"],
  capacity: int,
  precision: jax.lax.PrecisionLike,
) -> Float[Array, "M N"]:
  """The products of the first `capacity` rows of each group, as one batched product; 0 elsewhere."""
  num_rows = lhs.shape[0]
  ends = jnp.cumsum(group_sizes)
  starts = ends - group_sizes
  places = starts[:, None] + jnp.arange(capacity)
  taken = lhs[jnp.minimum(places, num_rows - 1)]
  results = jnp.einsum("grk,gkn->grn", taken, rhs, precision=precision, preferred_element_type=jnp.float32)
  rows = jnp.arange(num_rows)
  group = (rows[:, None] >= ends).sum(axis=1)
  place = rows - starts[jnp.minimum(group, ends.size - 1)]
  mine = (group < ends.size) & (place < capacity)
  found = results.reshape(-1, results.shape[-1])[jnp.where(mine, group * capacity + place, 0)]
  return jnp.where(mine[:, None], found, 0)


def _take(x: Float[Array, "M X"], rows: Int[Array, " R"], mine: Array | None = None) -> Float[Array, "R X"]:
  """x[rows], rows being consecutive, with 0 where not mine."""
  taken = jax.lax.dynamic_slice_in_dim(x, rows[0], rows.shape[0])
  return taken if mine is None else jnp.where(mine, taken, 0)


def _rows_product(
  lhs: Float[Array, "M K"],
  rhs: Float[Array, "G K N"],
  group_sizes: Int[Array, " G"],
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
  transpose_rhs: bool,
  width: int,
  epilogue: Callable[[Array], Array],
) -> Float[Array, "M W"]:
  """epilogue(lhs[rows of g] @ rhs[g]) for every group, written to a [M, width] array of zeros."""
  num_rows = lhs.shape[0]
  tiles = PRODUCT_TILES["small" if rhs[0].size <= SMALL_MATRIX else "large"]

  def many(g: Array, start: Array, end: Array, out: Array) -> Array:
    weight = jax.lax.dynamic_index_in_dim(rhs, g, keepdims=False)
    if transpose_rhs:
      # The slice is copied in any case; transposing that copy once is cheaper than transposing inside every product,
      # which is what XLA would make of it without the barrier.
      weight = jax.lax.optimization_barrier(weight.T)

    def tile(rows: Array, mine: Array | None, out: Array) -> Array:
      result = jnp.dot(_take(lhs, rows), weight, precision=precision, preferred_element_type=jnp.float32)
      result = epilogue(result.astype(dtype))
      if mine is not None:
        result = jnp.where(mine, result, _take(out, rows))
      return jax.lax.dynamic_update_slice_in_dim(out, result, rows[0], axis=0)

    return _over_tiles(tiles, num_rows, start, end, tile, out)

  def few(g: Array, start: Array, end: Array, out: Array) -> Array:
    def tile(rows: Array, mine: Array | None, out: Array) -> Array:  # the smallest has one row, so all are the group's
      taken = _take(lhs, rows).astype(jnp.float32)
      weight = jax.lax.dynamic_index_in_dim(rhs, g, keepdims=False).astype(jnp.float32)
      result = jnp.stack([(row[:, None] * weight).sum(axis=0) for row in taken])
      return jax.lax.dynamic_update_slice_in_dim(out, epilogue(result.astype(dtype)), rows[0], axis=0)

    return _over_tiles(FEW_TILES, num_rows, start, end, tile, out)

  def group(g: Array, start: Array, end: Array, out: Array) -> Array:
    if transpose_rhs:  # in backward passes only, whose groups are large
      return many(g, start, end, out)
    # Loops without a turn instead of lax.cond, which copies all of `out` for each group: only loops update in place.
    is_few = end - start <= FEW_ROWS
    out = few(g, start, jnp.where(is_few, end, start), out)
    return jax.lax.fori_loop(0, jnp.where(is_few, 0, 1), lambda _, out: many(g, start, end, out), out)

  empty = zeros((num_rows, width), dtype, like=lhs)
  capacities = () if transpose_rhs or lhs.dtype != jnp.float32 else _capacities(num_rows, rhs.shape[0])
  if not capacities:
    return _over_groups(group_sizes, group, empty)

  def batched(capacity: int) -> Callable[[], Array]:
    return lambda: epilogue(_batched(lhs, rhs, group_sizes, capacity, precision).astype(dtype))

  # Twice the mean is enough for most groups; the loop takes what is left.
  total = group_sizes.sum()
  choice = jnp.where(total <= rhs.shape[0], 0, 1 + sum(2 * total > c * rhs.shape[0] for c in capacities[:-1]))
  out = jax.lax.switch(choice, [lambda: empty, *map(batched, capacities)])
  return _over_groups(group_sizes, group, out, skip=jnp.array((0, *capacities))[choice])


def _capacities(num_rows: int, num_groups: int) -> tuple[int, ...]:
  """Rows per group of the batched products, ascending: the largest for when all rows are there."""
  if num_groups < BATCHED_GROUPS or not num_groups < num_rows <= BATCHED_ROWS * num_groups:
    return ()
  largest = max(4, 2 ** math.ceil(math.log2(2 * num_rows / num_groups)))
  return tuple(c for c in (largest // 4, largest // 2, largest) if c >= 4)


def product(
  lhs: Float[Array, "M K"],
  rhs: Array,
  group_sizes: Int[Array, " G"],
  *,
  transpose_rhs: bool,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
) -> Float[Array, "M N"]:
  """See `api.Backend`."""
  width = rhs.shape[1 if transpose_rhs else 2]
  return _rows_product(lhs, rhs, group_sizes, precision, dtype, transpose_rhs, width, lambda rows: rows)


def swiglu(
  lhs: Float[Array, "M K"],
  gate_up: Float[Array, "G K 2F"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
) -> Float[Array, "M F"]:
  """See `api.Backend`."""
  width = gate_up.shape[2] // 2
  return _rows_product(lhs, gate_up, group_sizes, precision, dtype, False, width, swiglu_halves)


def weight_product(
  lhs: Float[Array, "M K"],
  grad: Float[Array, "M N"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
) -> Float[Array, "G K N"]:
  """See `api.Backend`."""
  shape = lhs.shape[1], grad.shape[1]

  def group(g: Array, start: Array, end: Array, out: Array) -> Array:
    def tile(rows: Array, mine: Array | None, total: Array) -> Array:
      # Both sides are masked: 0 * NaN of an unused row would be NaN.
      left, right = _take(lhs, rows, mine), _take(grad, rows, mine)
      return total + jnp.dot(left.T, right, precision=precision, preferred_element_type=jnp.float32)

    total = _over_tiles(WEIGHT_PRODUCT_TILES, lhs.shape[0], start, end, tile, zeros(shape, jnp.float32, like=lhs))
    return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), g, axis=0)

  return _over_groups(group_sizes, group, zeros((group_sizes.shape[0], *shape), dtype, like=lhs))
