"""XLA's own grouped matmul, for comparison. Unused rows are not part of its contract, so they are masked here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _live(x: Float[Array, "M X"], group_sizes: Int[Array, " G"]) -> Float[Array, "M X"]:
  return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], x, 0)


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
  rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
  out = jax.lax.ragged_dot(
    _live(lhs, group_sizes), rhs, group_sizes, precision=precision, preferred_element_type=jnp.float32
  )
  return _live(out, group_sizes).astype(dtype)


def weight_product(
  lhs: Float[Array, "M K"],
  grad: Float[Array, "M N"],
  group_sizes: Int[Array, " G"],
  *,
  precision: jax.lax.PrecisionLike,
  dtype: jax.typing.DTypeLike,
) -> Float[Array, "G K N"]:
  """See `api.Backend`."""
  out = jax.lax.ragged_dot_general(
    _live(lhs, group_sizes),
    _live(grad, group_sizes),
    group_sizes,
    jax.lax.RaggedDotDimensionNumbers(
      dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    ),
    precision=precision,
    preferred_element_type=jnp.float32,
  )
  return out.astype(dtype)
