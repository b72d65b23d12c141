"""Exact attention in plain XLA with memory linear in the row: online softmax over blocks of queries and keys.

Only one block of logits exists at a time. For each block of queries, the loop over key blocks begins and ends at the
first and last one that causality and segments let some row of the batch see: a packed row of short sequences costs
little more than its diagonal. The backward pass computes the weights again, block by block (arXiv 2307.08691).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.ops.varying import zeros

BLOCK = 128
_MASKED = -1e30  # finite: differences of it are numbers, not NaN
_NOWHERE = jnp.iinfo(jnp.int32).max


class _Blocks(NamedTuple):
  """Which query may see which key: the key's index is at most the query's, and their segments are the same, not 0."""

  segments: Int[Array, "I B q"]
  first: Int[Array, " I"]  # of each block of queries: the first block of keys any of them sees,
  end: Int[Array, " I"]  # and the one after the last

  def split(self, x: Float[Array, "B T *d"]) -> Float[Array, "I B q *d"]:
    return _split(x, self.segments.shape[-1])

  def mask(self, i: Array, j: Array) -> Bool[Array, "B 1 1 q k"]:
    index = jnp.arange(self.segments.shape[-1])
    keys, queries = self.segments[j][:, None], self.segments[i][:, :, None]
    before = j * index.size + index <= (i * index.size + index)[:, None]
    return (before & (keys == queries) & (keys > 0))[:, None, None]


def forward(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M V"],
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
  """The output and the logarithm of each softmax's denominator; padding gives 0."""
  blocks = _blocks(query, segment_ids)
  batch, length, heads, _ = query.shape
  key_blocks, value_blocks = blocks.split(key), blocks.split(value)
  query_blocks = _by_head(blocks.split(_grouped(query, key.shape[2])))

  def of_queries(_, inputs):
    i, query = inputs

    def of_keys(j, carry):
      out, total, largest = carry
      logits = scale * jnp.einsum("bmgqd,bkmd->bmgqk", query, key_blocks[j], preferred_element_type=jnp.float32)
      mask = blocks.mask(i, j)
      new_largest = jnp.maximum(largest, jnp.where(mask, logits, _MASKED).max(axis=-1, keepdims=True))
      weights = jnp.where(mask, jnp.exp(logits - new_largest), 0)
      shrink = jnp.exp(largest - new_largest)
      values = value_blocks[j]
      out = shrink * out + jnp.einsum(
        "bmgqk,bkmv->bmgqv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
      )
      return out, shrink * total + weights.sum(axis=-1, keepdims=True), new_largest

    nothing = zeros((*query.shape[:-1], 1), jnp.float32, like=query)
    start = (zeros((*query.shape[:-1], value.shape[-1]), jnp.float32, like=query), nothing, nothing + _MASKED)
    out, total, largest = jax.lax.fori_loop(blocks.first[i], blocks.end[i], of_keys, start)
    empty = total == 0
    out = jnp.where(empty, 0, out / jnp.where(empty, 1, total)).astype(value.dtype)
    # Of a query that sees nothing: so large that the backward pass finds every weight 0.
    lse = jnp.where(empty, -_MASKED, largest + jnp.log(jnp.where(empty, 1, total)))
    return None, (out, lse)

  _, (out, lse) = jax.lax.scan(of_queries, None, (jnp.arange(blocks.first.shape[0]), query_blocks))
  whole = lambda x: _join_rows(_by_query(x), length).reshape(batch, length, heads, -1)
  return whole(out), whole(lse)[..., 0].swapaxes(1, 2)


def backward(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M V"],
  out: Float[Array, "B T N V"],
  lse: Float[Array, "B N T"],
  grad: Float[Array, "B T N V"],
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T M D"], Float[Array, "B T M V"]]:
  """Gradients of query, key and value, for the gradient of `out`."""
  blocks = _blocks(query, segment_ids)
  groups = key.shape[2]
  delta = jnp.einsum("btnv,btnv->bnt", out, grad, preferred_element_type=jnp.float32)
  split = lambda x: _by_head(blocks.split(_grouped(x, groups)))
  of_rows = lambda x: split(x.swapaxes(1, 2)[..., None])  # [I B m g q 1]
  key_blocks, value_blocks = blocks.split(key), blocks.split(value)

  def of_queries(carry, inputs):
    i, query, grad, lse, delta = inputs

    def of_keys(j, carry):
      d_query, d_key, d_value = carry
      key, value = key_blocks[j], value_blocks[j]
      logits = scale * jnp.einsum("bmgqd,bkmd->bmgqk", query, key, preferred_element_type=jnp.float32)
      weights = jnp.where(blocks.mask(i, j), jnp.exp(logits - lse), 0)
      d_weights = jnp.einsum("bmgqv,bkmv->bmgqk", grad, value, preferred_element_type=jnp.float32)
      d_logits = (scale * weights * (d_weights - delta)).astype(query.dtype)
      dot = lambda spec, a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
      d_query += dot("bmgqk,bkmd->bmgqd", d_logits, key)
      d_key = d_key.at[j].add(dot("bmgqk,bmgqd->bkmd", d_logits, query))
      d_value = d_value.at[j].add(dot("bmgqk,bmgqv->bkmv", weights.astype(grad.dtype), grad))
      return d_query, d_key, d_value

    start = (zeros(query.shape, jnp.float32, like=query), *carry)
    d_query, *carry = jax.lax.fori_loop(blocks.first[i], blocks.end[i], of_keys, start)
    return tuple(carry), d_query.astype(query.dtype)

  start = tuple(zeros(x.shape, jnp.float32, like=x) for x in (key_blocks, value_blocks))
  index = jnp.arange(blocks.first.shape[0])
  (d_key, d_value), d_query = jax.lax.scan(
    of_queries, start, (index, split(query), split(grad), of_rows(lse), of_rows(delta))
  )
  whole = lambda d, x: _join_rows(d, x.shape[1]).reshape(x.shape).astype(x.dtype)
  return whole(_by_query(d_query), query), whole(d_key, key), whole(d_value, value)


def _blocks(query: Float[Array, "B T N D"], segment_ids: Int[Array, "B T"] | None) -> _Blocks:
  shape = query.shape[:2]
  segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
  segments = _split(segments, BLOCK)
  # A block of queries may see one of keys where their ranges of segments overlap: a superset, and exact if segments
  # lie one after the other.
  low = jnp.where(segments > 0, segments, _NOWHERE).min(axis=-1)
  high = segments.max(axis=-1)
  overlap = ((low <= high[:, None]) & (high >= low[:, None])).any(axis=-1)  # [I J]
  seen = jnp.tril(overlap)
  last = seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1)
  return _Blocks(segments, jnp.argmax(seen, axis=1), jnp.where(seen.any(axis=1), last, 0))


def _split(x: Array, size: int) -> Array:
  """[B, T, ...] to [blocks, B, size, ...]; what is added at the end is 0: padding."""
  count = math.ceil(x.shape[1] / size)
  x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
  return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _join_rows(x: Array, length: int) -> Array:
  """[blocks, B, size, ...] to [B, T, ...]."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _grouped(x: Float[Array, "B T N D"], groups: int) -> Float[Array, "B T M G D"]:
  return x.reshape(*x.shape[:2], groups, -1, x.shape[-1])


def _by_head(x: Float[Array, "I B q M G D"]) -> Float[Array, "I B M G q D"]:
  """With queries next to what is summed: their products with keys need no turning around, which takes a CPU longer."""
  return x.transpose(0, 1, 3, 4, 2, 5)


def _by_query(x: Float[Array, "I B M G q D"]) -> Float[Array, "I B q M G D"]:
  return x.transpose(0, 1, 4, 2, 3, 5)
