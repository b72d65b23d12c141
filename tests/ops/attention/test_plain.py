"""Attention against a plain numpy of one head at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zeda_jax.ops.attention.plain import masked_attention, packed_mask

attention = functools.partial(masked_attention, scale=8**-0.5)  # of the heads of `inputs`


def plain_attention(query, key, value, mask):
  """[T, N, D] x [S, M, D] -> [T, N, D] in float64; rows with nothing to see come out as NaN."""
  query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
  out = np.zeros(query.shape)
  for head in range(query.shape[1]):
    shared = head // (query.shape[1] // key.shape[1])
    for t in range(query.shape[0]):
      seen = np.flatnonzero(mask[t])
      if not seen.size:
        out[t, head] = np.nan
        continue
      logits = key[seen, shared] @ query[t, head] / np.sqrt(query.shape[-1])
      weights = np.exp(logits - logits.max())
      out[t, head] = weights / weights.sum() @ value[seen, shared]
  return out


def inputs(batch=2, length=9, heads=6, shared=2, dim=8, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  return draw(batch, length, heads, dim), draw(batch, length, shared, dim), draw(batch, length, shared, dim)


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (4, 4), (4, 1)])
def test_attention_equals_the_plain_one(heads, shared):
  query, key, value = inputs(heads=heads, shared=shared)
  mask = np.asarray(packed_mask(None, 9))
  out = jax.jit(attention)(query, key, value, mask)
  for row in range(2):
    np.testing.assert_allclose(out[row], plain_attention(query[row], key[row], value[row], mask[0]), atol=1e-5)


def test_segments_see_only_themselves():
  query, key, value = inputs()
  segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 3]])
  mask = np.asarray(packed_mask(segments, 9))
  for b in range(2):
    for t in range(9):
      for s in range(9):
        assert mask[b, t, s] == (s <= t and segments[b, s] == segments[b, t] != 0)
  out = np.asarray(jax.jit(attention)(query, key, value, mask))
  assert np.isfinite(out).all()  # padding attends to nothing and still gives numbers
  for b in range(2):
    live = segments[b] > 0
    np.testing.assert_allclose(out[b][live], plain_attention(query[b], key[b], value[b], mask[b])[live], atol=1e-5)


def test_large_logits_and_bfloat16():
  query, key, value = inputs()
  mask = packed_mask(None, 9)
  huge = jax.jit(attention)(query * 1e4, key, value, mask)
  np.testing.assert_allclose(huge[0], plain_attention(query[0] * 1e4, key[0], value[0], mask[0]), atol=1e-4)
  narrow = jax.jit(attention)(*(a.astype(jnp.bfloat16) for a in (query, key, value)), mask)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(narrow[0], float), plain_attention(query[0], key[0], value[0], mask[0]), atol=0.05
  )
