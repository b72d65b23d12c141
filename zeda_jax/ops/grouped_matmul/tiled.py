"""Grouped matmul in plain XLA: a loop over (group, row tile) pairs with a dynamic trip count, on any device.

The loop runs once per row tile that holds a live row, so time follows sum(group_sizes), not M, and an empty group
costs nothing. Tiles start at their group's first row; a tile's rows past the end of its group are masked.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROW_TILE = 128


def _tiles(
  group_sizes: Int[Array, " G"], num_rows: int, tile: int
) -> tuple[Int[Array, ""], Int[Array, " P"], Int[Array, " P"], Int[Array, " P"]]:
  """The work list: number of live tiles, and group, first row and end row of each (P = the most there can be)."""
  group_sizes = group_sizes.astype(jnp.int32)
  ends = jnp.cumsum(group_sizes)
  tiles_per_group = (group_sizes + tile - 1) // tile
  tile_ends = jnp.cumsum(tiles_per_group)
  most = -(-num_rows // tile) + group_sizes.shape[0]
  index = jnp.arange(most, dtype=jnp.int32)
  # group[i] = the group whose range of tiles holds i; equals repeat(arange(G), tiles_per_group).
  group = jnp.minimum(jnp.searchsorted(tile_ends, index, side="right").astype(jnp.int32), group_sizes.shape[0] - 1)
  within = index - (tile_ends - tiles_per_group)[group]
  start = (ends - group_sizes)[group] + within * tile
  return tile_ends[-1], group, start, jnp.minimum(start + tile, ends[group])


def _slice_rows(x: Array, start: Array, tile: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, start, tile, axis=0)


def _product(
  lhs: Float[Array, "M K"], rhs: Array, group_sizes: Int[Array, " G"], transposed: bool, precision, dtype
) -> Float[Array, "M N"]:
  """rows of group g: lhs @ rhs[g], or lhs @ rhs[g].T where transposed."""
  num_rows = lhs.shape[0]
  tile = min(ROW_TILE, num_rows)
  count, group, starts, ends = _tiles(group_sizes, num_rows, tile)
  contract = ((1,), (1 if transposed else 0,))

  def body(i, out):
    # The last tiles of the array are shifted back to stay inside it, so rows before `starts` are masked as well.
    first = jnp.minimum(starts[i], num_rows - tile)
    rows = first + jnp.arange(tile)
    mine = ((rows >= starts[i]) & (rows < ends[i]))[:, None]
    weight = jax.lax.dynamic_index_in_dim(rhs, group[i], keepdims=False)
    product = jax.lax.dot_general(
      _slice_rows(lhs, first, tile), weight, (contract, ((), ())), precision=precision, preferred_element_type=dtype
    )
    merged = jnp.where(mine, product, _slice_rows(out, first, tile))
    return jax.lax.dynamic_update_slice_in_dim(out, merged, first, axis=0)

  width = rhs.shape[1 if transposed else 2]
  return jax.lax.fori_loop(0, count, body, jnp.zeros((num_rows, width), dtype))


def _weight_product(
  lhs: Float[Array, "M K"], grad: Float[Array, "M N"], group_sizes: Int[Array, " G"], precision, dtype
) -> Float[Array, "G K N"]:
  """out[g] = lhs[rows of g].T @ grad[rows of g]."""
  num_rows = lhs.shape[0]
  tile = min(ROW_TILE, num_rows)
  count, group, starts, ends = _tiles(group_sizes, num_rows, tile)

  def body(i, out):
    first = jnp.minimum(starts[i], num_rows - tile)
    rows = first + jnp.arange(tile)
    mine = ((rows >= starts[i]) & (rows < ends[i]))[:, None]
    # Both sides are masked: 0 * NaN of an unused row would be NaN.
    left = jnp.where(mine, _slice_rows(lhs, first, tile), 0)
    right = jnp.where(mine, _slice_rows(grad, first, tile), 0)
    product = jax.lax.dot_general(
      left, right, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
    total = jax.lax.dynamic_index_in_dim(out, group[i], keepdims=False) + product
    return jax.lax.dynamic_update_index_in_dim(out, total, group[i], axis=0)

  out = jnp.zeros((group_sizes.shape[0], lhs.shape[1], grad.shape[1]), jnp.float32)
  return jax.lax.fori_loop(0, count, body, out).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(lhs, rhs, group_sizes, precision, dtype):
  return _product(lhs, rhs, group_sizes, False, precision, dtype)


def _forward(lhs, rhs, group_sizes, precision, dtype):
  return _product(lhs, rhs, group_sizes, False, precision, dtype), (lhs, rhs, group_sizes)


def _backward(precision, dtype, residuals, grad):
  lhs, rhs, group_sizes = residuals
  grad_lhs = _product(grad, rhs, group_sizes, True, precision, lhs.dtype)
  grad_rhs = _weight_product(lhs, grad, group_sizes, precision, rhs.dtype)
  return grad_lhs, grad_rhs, None


_grouped_matmul.defvjp(_forward, _backward)


def grouped_matmul(
  lhs: Float[Array, "M K"],
  rhs: Float[Array, "G K N"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "M N"]:
  """See `zeda_jax.grouped_matmul`."""
  dtype = jnp.dtype(preferred_element_type or jnp.result_type(lhs, rhs))
  return _grouped_matmul(lhs, rhs, group_sizes, precision, dtype)
