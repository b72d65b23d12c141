"""Grouped (ragged) matmul whose cost follows the rows that are there: one typed function over several backends."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zeda_jax.errors import ZedaError
from zeda_jax.ops.grouped_matmul import reference, tiled

__all__ = ["BACKENDS", "grouped_matmul"]


def _ragged_dot(lhs, rhs, group_sizes, *, precision=None, preferred_element_type=None):
  """XLA's own, for comparison. Rows past the sum are not part of its contract, so they are masked on both sides."""
  live = (jnp.arange(lhs.shape[0]) < group_sizes.sum())[:, None]
  out = jax.lax.ragged_dot(
    jnp.where(live, lhs, 0),
    rhs,
    group_sizes.astype(jnp.int32),
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return jnp.where(live, out, 0)


BACKENDS = {
  "tiled": tiled.grouped_matmul,
  "ragged_dot": _ragged_dot,
  "reference": reference.grouped_matmul,
}


def grouped_matmul(
  lhs: Float[Array, "M K"],
  rhs: Float[Array, "G K N"],
  group_sizes: Int[Array, " G"],
  *,
  backend: str | None = None,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jnp.dtype | None = None,
) -> Float[Array, "M N"]:
  """out[i] = lhs[i] @ rhs[g], where g is the group that row i falls into when groups lie one after another.

  Rows past sum(group_sizes) are never used: they come out exactly 0, get gradient exactly 0, may hold NaN, and cost
  nothing; so do empty groups. Accumulation is in fp32. Differentiable in lhs and rhs.

  Args:
    lhs: rows sorted by group.
    rhs: one matrix per group.
    group_sizes: rows per group; the sum is at most M.
    backend: a name in BACKENDS; None picks the best for the platform.
    precision: of the products, as in jax.lax.dot.
    preferred_element_type: of the result; None means the operands' type.

  Raises:
    ZedaError: the shapes do not fit each other or the backend is unknown.
  """
  if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.ndim != 1:
    raise ZedaError(
      f"grouped_matmul: expected lhs [M, K], rhs [G, K, N], group_sizes [G]; found {lhs.shape}, {rhs.shape}, "
      f"{group_sizes.shape}."
    )
  if lhs.shape[1] != rhs.shape[1] or rhs.shape[0] != group_sizes.shape[0]:
    raise ZedaError(f"grouped_matmul: lhs {lhs.shape}, rhs {rhs.shape} and group_sizes {group_sizes.shape} do not fit.")
  name = backend or "tiled"
  if name not in BACKENDS:
    raise ZedaError(f"grouped_matmul: backend is {name!r}; expected one of {', '.join(BACKENDS)}.")
  if lhs.shape[0] == 0:  # no tile to take work from
    return jnp.zeros((0, rhs.shape[2]), preferred_element_type or jnp.result_type(lhs, rhs))
  return BACKENDS[name](lhs, rhs, group_sizes, precision=precision, preferred_element_type=preferred_element_type)
