"""The obvious dense oracle: every row times every group's matrix, then keep the row's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def rows_of_groups(group_sizes: Int[Array, " G"], num_rows: int) -> Bool[Array, "G M"]:
  """True where row m belongs to group g; all False for the rows past sum(group_sizes)."""
  ends = jnp.cumsum(group_sizes)[:, None]
  rows = jnp.arange(num_rows)
  return (rows >= ends - group_sizes[:, None]) & (rows < ends)


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
  mine = rows_of_groups(group_sizes, lhs.shape[0])[:, :, None]
  lhs_gmk = jnp.where(mine, lhs, 0)  # not a product with 0: an unused row may hold NaN
  equation = "gmk,gnk->mn" if transpose_rhs else "gmk,gkn->mn"
  return jnp.einsum(equation, lhs_gmk, rhs, precision=precision, preferred_element_type=jnp.float32).astype(dtype)


def weight_product(
  lhs: Float[Array, "M K"],
  grad: Float[Array, "M N"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
) -> Float[Array, "G K N"]:
  """See `api.Backend`."""
  mine = rows_of_groups(group_sizes, lhs.shape[0])[:, :, None]
  lhs_gmk, grad_gmn = jnp.where(mine, lhs, 0), jnp.where(mine, grad, 0)
  out = jnp.einsum("gmk,gmn->gkn", lhs_gmk, grad_gmn, precision=precision, preferred_element_type=jnp.float32)
  return out.astype(dtype)
