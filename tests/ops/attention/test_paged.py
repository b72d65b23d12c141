"""Attention over pages against plain attention over rows put together by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zeda_jax.ops.attention import paged
from zeda_jax.ops.attention.plain import masked_attention

LENGTHS = np.array([0, 1, 7, 8, 9, 30, 0, 40], np.int32)
LAYERS, PAGES, SIZE, WIDTH = 2, 24, 8, 6


def inputs(groups, heads, dims, seed=0):
  """Rows with random keys and values in random pages, and NaN wherever no row has a token."""
  rng = np.random.default_rng(seed)
  rows = [rng.standard_normal((len(LENGTHS), WIDTH * SIZE, groups, d), np.float32) for d in dims]
  pages = [np.full((LAYERS, PAGES, groups, SIZE, d), np.nan, np.float32) for d in dims]
  table = np.full((len(LENGTHS), WIDTH), PAGES, np.int32)
  free = rng.permutation(PAGES).tolist()
  for b, length in enumerate(LENGTHS):
    for j in range(-(-length // SIZE)):
      table[b, j] = free.pop()
    for t in range(length):
      for whole, page in zip(rows, pages, strict=True):
        page[1, table[b, t // SIZE], :, t % SIZE] = whole[b, t]
  query = rng.standard_normal((len(LENGTHS), heads, dims[0]), np.float32)
  return query, tuple(map(jnp.asarray, pages)), table, rows


@pytest.mark.parametrize("block", [8, 48, 2048], ids="{} tokens a block".format)
@pytest.mark.parametrize("kind", ["keys and values", "latents"])
def test_pages_equal_rows(monkeypatch, kind, block):
  monkeypatch.setattr(paged, "_BLOCK_TOKENS", block)
  latent = kind == "latents"
  query, pages, table, rows = inputs(*((1, 4, (12,)) if latent else (2, 6, (8, 5))))
  options = {"scale": 0.3, "value_dim": 7} if latent else {}
  run = jax.jit(lambda *a: paged.paged_attention(*a, **options))
  found = run(query, pages, jnp.int32(1), table, LENGTHS)
  value = rows[0][..., :7] if latent else rows[1]
  mask = np.arange(WIDTH * SIZE) < LENGTHS[:, None, None]
  expected = masked_attention(query[:, None], rows[0], value, mask, options.get("scale", 8**-0.5))[:, 0]
  live = LENGTHS > 0
  np.testing.assert_allclose(found[live], expected[live], rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found[~live], 0)


def test_nobody_there():
  query, pages, table, _ = inputs(2, 6, (8, 5))
  np.testing.assert_array_equal(paged.paged_attention(query, pages, jnp.int32(0), table, 0 * LENGTHS), 0)
