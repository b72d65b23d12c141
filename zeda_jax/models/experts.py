"""The experts of one layer as pure functions: drop the zero picks, run the rest as two grouped matmuls, combine."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zeda_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu

# Scatters are loops over their indices on a CPU: while decoding, comparing and sorting take less.
_FEW_COUNTS = 2**18  # picks times experts
_FEW_PICKS = 2**10


def run_experts(
  x: Float[Array, "T H"],
  picks: Int[Array, "T K"],
  weights: Float[Array, "T K"],
  gate_up: Float[Array, "N H 2F"],
  down: Float[Array, "N F H"],
  backend: str | None = None,
) -> Float[Array, "T H"]:
  """Sum over a token's picks below N of weight * expert(x). Picks >= N cost no matmul row.

  Equals, with one_hot [T, K, N] of the picks (all-zero rows for ids >= N):
    inner = einsum("th,nhf->tnf", x, gate_up);  gate, up = split(inner);
    expert = einsum("tnf,nfh->tnh", silu(gate) * up, down);
    out = einsum("tnh,tkn,tk->th", expert, one_hot, weights)
  """
  num_experts = gate_up.shape[0]
  with jax.named_scope("dispatch"):
    # Sorting by expert id puts the ids >= N last, past the rows that group_sizes covers.
    ids = jnp.minimum(picks, num_experts).reshape(-1)
    order = jnp.argsort(ids, stable=True)  # sorted row -> (token, slot)
    # (token, slot) -> sorted row. The picks that take no expert all look at the last row: if there are any, it is one
    # of theirs, hence 0, and reading one row again costs little.
    places = jnp.argsort(order) if order.size <= _FEW_PICKS else inverse(order)
    row_of = jnp.where(ids < num_experts, places, order.size - 1).reshape(picks.shape)
    # group_sizes[e] = sum(ids == e)
    if ids.size * num_experts <= _FEW_COUNTS:
      group_sizes = (ids[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    else:
      group_sizes = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    rows = _dispatch(x, order, row_of)
  with jax.named_scope("experts"):
    act = grouped_swiglu(rows, gate_up, group_sizes, backend=backend)
    out = grouped_matmul(act, down, group_sizes, backend=backend)
  with jax.named_scope("combine"):
    return _combine(out, weights, order, row_of)


def inverse(order: Int[Array, " M"]) -> Int[Array, " M"]:
  """inverse[order[i]] = i for a permutation; equals argsort(order), without sorting."""
  return jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)


# Both ways between tokens and sorted rows are gathers, and so are their transposes: XLA's scatter-add, which autodiff
# would produce, is slow on every backend.
@jax.custom_vjp
def _dispatch(x: Float[Array, "T H"], order: Int[Array, " M"], row_of: Int[Array, "T K"]) -> Float[Array, "M H"]:
  """x[order // K]: the token of every sorted pick."""
  return x[order // row_of.shape[1]]


_dispatch.defvjp(
  lambda x, order, row_of: (_dispatch(x, order, row_of), row_of),
  lambda row_of, grad: (_sum_rows(grad, row_of).astype(grad.dtype), None, None),
)


@jax.custom_vjp
def _combine(
  rows: Float[Array, "M H"], weights: Float[Array, "T K"], order: Int[Array, " M"], row_of: Int[Array, "T K"]
) -> Float[Array, "T H"]:
  """einsum("tkh,tk->th", rows[row_of], weights), summed in fp32."""
  return _sum_rows(rows, row_of, weights).astype(rows.dtype)


def _combine_forward(rows, weights, order, row_of):
  return _combine(rows, weights, order, row_of), (rows, weights, order, row_of)


def _combine_backward(residuals, grad):
  rows, weights, order, row_of = residuals
  top_k = row_of.shape[1]
  d_rows = grad[order // top_k] * weights.reshape(-1)[order][:, None].astype(grad.dtype)
  d_weights = [
    jnp.einsum("th,th->t", rows[row_of[:, k]], grad, preferred_element_type=jnp.float32) for k in range(top_k)
  ]
  return d_rows, jnp.stack(d_weights, axis=1).astype(weights.dtype), None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _sum_rows(
  rows: Float[Array, "M H"], row_of: Int[Array, "T K"], weights: Float[Array, "T K"] | None = None
) -> Float[Array, "T H"]:
  """rows[row_of].sum(axis=1), weighted, in fp32; slot by slot, so that no [T, K, H] array is made."""
  total = jnp.zeros((row_of.shape[0], rows.shape[1]), jnp.float32)
  for k in range(row_of.shape[1]):
    row = rows[row_of[:, k]].astype(jnp.float32)
    total += row if weights is None else row * weights[:, k, None].astype(jnp.float32)
  return total
