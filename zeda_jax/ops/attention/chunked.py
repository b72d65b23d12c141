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

  query_index: Int[Array, "I B q"]
  query_segments: Int[Array, "I B q"]
  key_segments: Int[Array, "J B k"]
  first: Int[Array, " I"]  # of each block of queries: the first block of keys any of them sees,
  end: Int[Array, " I"]  # and the one after the last

  def mask(self, i: Array, j: Array) -> Bool[Array, "B 1 1 q k"]:
    size = self.key_segments.shape[-1]
    keys, queries = self.key_segments[j][:, None], self.query_segments[i][:, :, None]
    before = j * size + jnp.arange(size) <= self.query_index[i][:, :, None]
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
  return _forward(query, key, value, _packed(query, segment_ids), scale)


def cached(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B S M D"],
  value: Float[Array, "B S M V"],
  positions: Int[Array, "B T"],
  *,
  scale: float,
) -> Float[Array, "B T N V"]:
  """Queries that see the slots 0 .. positions[t] of a cache. Has no gradient."""
  ones = jnp.ones(positions.shape, jnp.int32)
  return _forward(query, key, value, _blocks(positions, ones, jnp.ones(key.shape[:2], jnp.int32)), scale)[0]


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
  blocks = _packed(query, segment_ids)
  groups = key.shape[2]
  delta = jnp.einsum("btnv,btnv->bnt", out, grad, preferred_element_type=jnp.float32)
  split = lambda x: _split_rows(_grouped(x, groups), blocks.query_index)
  by_head = lambda x: split(x.swapaxes(1, 2)[..., None]).transpose(0, 1, 3, 4, 2, 5)  # [I B m g q 1]
  key_blocks, value_blocks = (_split_rows(x, blocks.key_segments) for x in (key, value))

  def of_queries(carry, inputs):
    i, query, grad, lse, delta = inputs

    def of_keys(j, carry):
      d_query, d_key, d_value = carry
      key, value = key_blocks[j], value_blocks[j]
      logits = scale * jnp.einsum("bqmgd,bkmd->bmgqk", query, key, preferred_element_type=jnp.float32)
      weights = jnp.where(blocks.mask(i, j), jnp.exp(logits - lse), 0)
      d_weights = jnp.einsum("bqmgv,bkmv->bmgqk", grad, value, preferred_element_type=jnp.float32)
      d_logits = (scale * weights * (d_weights - delta)).astype(query.dtype)
      dot = lambda spec, a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
      d_query += dot("bmgqk,bkmd->bqmgd", d_logits, key)
      d_key = d_key.at[j].add(dot("bmgqk,bqmgd->bkmd", d_logits, query))
      d_value = d_value.at[j].add(dot("bmgqk,bqmgv->bkmv", weights.astype(grad.dtype), grad))
      return d_query, d_key, d_value

    start = (zeros(query.shape, jnp.float32, like=query), *carry)
    d_query, *carry = jax.lax.fori_loop(blocks.first[i], blocks.end[i], of_keys, start)
    return tuple(carry), d_query.astype(query.dtype)

  start = tuple(zeros(x.shape, jnp.float32, like=x) for x in (key_blocks, value_blocks))
  index = jnp.arange(blocks.first.shape[0])
  (d_key, d_value), d_query = jax.lax.scan(
    of_queries, start, (index, split(query), split(grad), by_head(lse), by_head(delta))
  )
  whole = lambda d, x: _join_rows(d, x.shape[1]).reshape(x.shape).astype(x.dtype)
  return whole(d_query, query), whole(d_key, key), whole(d_value, value)


def _forward(query, key, value, blocks: _Blocks, scale: float):
  batch, length, heads, _ = query.shape
  key_blocks, value_blocks = (_split_rows(x, blocks.key_segments) for x in (key, value))
  query_blocks = _split_rows(_grouped(query, key.shape[2]), blocks.query_index)

  def of_queries(_, inputs):
    i, query = inputs
    _, size, groups, shared, _ = query.shape
    by_head = query.transpose(0, 2, 3, 1, 4)

    def of_keys(j, carry):
      out, total, largest = carry
      logits = scale * jnp.einsum("bmgqd,bkmd->bmgqk", by_head, key_blocks[j], preferred_element_type=jnp.float32)
      mask = blocks.mask(i, j)
      new_largest = jnp.maximum(largest, jnp.where(mask, logits, _MASKED).max(axis=-1, keepdims=True))
      weights = jnp.where(mask, jnp.exp(logits - new_largest), 0)
      shrink = jnp.exp(largest - new_largest)
      values = value_blocks[j]
      out = shrink * out + jnp.einsum(
        "bmgqk,bkmv->bmgqv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
      )
      return out, shrink * total + weights.sum(axis=-1, keepdims=True), new_largest

    rows = (batch, groups, shared, size)
    nothing = zeros((*rows, 1), jnp.float32, like=query)
    start = (zeros((*rows, value.shape[-1]), jnp.float32, like=query), nothing, nothing + _MASKED)
    out, total, largest = jax.lax.fori_loop(blocks.first[i], blocks.end[i], of_keys, start)
    empty = total == 0
    out = jnp.where(empty, 0, out / jnp.where(empty, 1, total)).astype(value.dtype)
    # Of a query that sees nothing: so large that the backward pass finds every weight 0.
    lse = jnp.where(empty, -_MASKED, largest + jnp.log(jnp.where(empty, 1, total)))
    return None, (out.transpose(0, 3, 1, 2, 4), lse.transpose(0, 3, 1, 2, 4))

  _, (out, lse) = jax.lax.scan(of_queries, None, (jnp.arange(blocks.first.shape[0]), query_blocks))
  out = _join_rows(out, length).reshape(batch, length, heads, -1)
  return out, _join_rows(lse, length).reshape(batch, length, heads).swapaxes(1, 2)


def _packed(query: Float[Array, "B T N D"], segment_ids: Int[Array, "B T"] | None) -> _Blocks:
  shape = query.shape[:2]
  segments = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
  return _blocks(jnp.broadcast_to(jnp.arange(shape[1]), shape), segments, segments)


def _blocks(
  query_index: Int[Array, "B T"], query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"]
) -> _Blocks:
  index, of_queries = (_split(x, _block_size(x.shape[1])) for x in (query_index, query_segments))
  of_keys = _split(key_segments, _block_size(key_segments.shape[1]))
  # A block of queries may see one of keys where their ranges of segments overlap: a superset, and exact if segments
  # lie one after the other.
  low = lambda x: jnp.where(x > 0, x, _NOWHERE).min(axis=-1)
  high = lambda x: x.max(axis=-1)
  some = (low(of_keys) <= high(of_queries)[:, None]) & (high(of_keys) >= low(of_queries)[:, None])  # [I J B]
  starts = jnp.arange(of_keys.shape[0])[:, None] * of_keys.shape[-1]
  seen = (some & (starts <= index.max(axis=-1)[:, None])).any(axis=-1)
  last = seen.shape[1] - jnp.argmax(seen[:, ::-1], axis=1)
  return _Blocks(index, of_queries, of_keys, jnp.argmax(seen, axis=1), jnp.where(seen.any(axis=1), last, 0))


def _block_size(length: int) -> int:
  return min(BLOCK, math.ceil(length / 128) * 128)


def _split(x: Array, size: int) -> Array:
  """[B, T, ...] to [blocks, B, size, ...]; what is added at the end is 0: padding."""
  count = math.ceil(x.shape[1] / size)
  x = jnp.pad(x, ((0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
  return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _split_rows(x: Array, like: Int[Array, "J B k"]) -> Array:
  return _split(x, like.shape[-1])


def _join_rows(x: Array, length: int) -> Array:
  """[blocks, B, size, ...] to [B, T, ...]."""
  x = x.swapaxes(0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _grouped(x: Float[Array, "B T N D"], groups: int) -> Float[Array, "B T M G D"]:
  return x.reshape(*x.shape[:2], groups, -1, x.shape[-1])
