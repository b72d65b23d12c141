"""Decoding through pages against the forward pass without a cache; latents in pages that are wider than they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_models import GLM, GLM_4_7_FLASH, forward, random_tokens, tiny_model
from zeda_jax.models.decoder import inject
from zeda_jax.models.paged_cache import PagedCache, init_pages, page_bytes
from zeda_jax.models.params import merge_model, split_model


@pytest.mark.parametrize("options", [{"moe_layers": (True, False)}, GLM], ids=["keys and values", "latents"])
def test_a_prompt_and_single_tokens_give_the_same_as_one_forward_pass(options):
  """The second row's prompt is shorter, and its pages lie in between and in another order."""
  model = inject(tiny_model(**options), 3)
  graphdef, params = split_model(model)
  step = jax.jit(lambda p, *inputs, cache: merge_model(graphdef, p).hidden(*inputs, cache=cache))
  tokens, prompts, steps = random_tokens((2, 24)), np.array([20, 13]), 4
  expected = forward(model, tokens).logits
  table = jnp.array([[5, 1, 3], [4, 0, 2]])
  index = np.broadcast_to(np.arange(24), (2, 24))
  cache = PagedCache(init_pages(model.config, 6, 8), table, fresh=True)
  live = index < prompts[:, None]
  out = step(params, tokens, live.astype(np.int32), index, cache=cache)
  close = lambda hidden, logits: np.testing.assert_allclose(model.logits(hidden), logits, rtol=0, atol=1e-4)
  close(out.hidden[live], expected[live])
  rows = np.arange(2)
  for at in (prompts + i for i in range(steps)):
    cache = PagedCache(out.cache.pages, table)
    out = step(params, tokens[rows, at][:, None], None, at[:, None], cache=cache)
    close(out.hidden[:, 0], expected[rows, at])


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
