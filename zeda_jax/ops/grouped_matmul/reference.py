"""The obvious dense oracle: every row times every group's matrix, then keep the row's own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def group_ids(group_sizes: Int[Array, " G"], num_rows: int) -> Int[Array, " M"]:
  """The group of each row; G for the rows past sum(group_sizes)."""
  return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")


def grouped_matmul(
  lhs: Float[Array, "M K"],
  rhs: Float[Array, "G K N"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "M N"]:
  """out[i] = lhs[i] @ rhs[group of row i]; rows past sum(group_sizes) are 0."""
  groups = group_ids(group_sizes, lhs.shape[0])
  one_hot_mg = groups[:, None] == jnp.arange(rhs.shape[0])
  live = (groups < rhs.shape[0])[:, None]
  lhs = jnp.where(live, lhs, 0)
  out_gmn = jnp.einsum("mk,gkn->gmn", lhs, rhs, precision=precision, preferred_element_type=jnp.float32)
  out = jnp.einsum("gmn,mg->mn", out_gmn, one_hot_mg.astype(jnp.float32), precision="highest")
  return jnp.where(live, out, 0).astype(preferred_element_type or jnp.result_type(lhs, rhs))
