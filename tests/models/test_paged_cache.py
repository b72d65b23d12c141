"""Latents in pages that are wider than they are."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tiny_models import GLM_4_7_FLASH
from zeda_jax.models.paged_cache import PagedCache, init_pages, page_bytes


def test_wide_latents_lie_in_whole_tiles_and_attention_sees_none_of_it():
  config = GLM_4_7_FLASH.replace(moe_layers=(True,), dtype="float32")
  width, rank, heads, tokens = 512 + 64, 512, 2, 5
  assert page_bytes(config, 64) == 64 * 640 * 4
  pages = init_pages(config, 3, 4)
  keys = jax.random.split(jax.random.key(0), 2)
  latents = jax.random.normal(keys[0], (1, tokens, 1, width))
  query = jax.random.normal(keys[1], (1, 1, heads, width))
  cache = PagedCache(pages, jnp.array([[2, 0]]))
  cache = cache.write(jnp.int32(0), jnp.arange(tokens)[None], None, latents)
  assert not np.asarray(cache.pages[0][..., width:]).any()
  for scale in (None, 0.1):
    found = cache.attend(query, jnp.int32(0), jnp.array([[tokens - 1]]), None, scale=scale, value_dim=rank)
    logits = jnp.einsum("nd,td->nt", query[0, 0], latents[0, :, 0]) * (width**-0.5 if scale is None else scale)
    expected = jax.nn.softmax(logits) @ latents[0, :, 0, :rank]
    np.testing.assert_allclose(found[0, 0], expected, rtol=2e-5, atol=2e-5)
