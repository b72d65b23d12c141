"""Latent attention: both forms give the same, the cache holds latents alone, decoding expands nothing per head."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.tiny_models import GLM, GLM_4_7_FLASH, QWEN3_30B_A3B, layer_of, tiny_model
from zeda_jax.models.paged_cache import PagedCache, init_pages, page_bytes
from zeda_jax.ops.attention.plain import masked_attention


def test_both_forms_agree():
  mla = layer_of(tiny_model(**GLM).runs[0].attention)
  rng = np.random.default_rng(0)
  query, latents = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 4, 18), (2, 9, 28)))
  positions = jnp.array([[0, 2, 4, 6, 8], [1, 3, 5, 7, 8]])
  attend = lambda query, *rows: masked_attention(query, *rows, jnp.arange(9) <= positions[:, :, None], mla.scale)
  expanded = attend(query, *mla._expanded(latents))
  rows = latents[:, :, None]
  absorbed = mla._absorbed(query, lambda query: attend(query, rows, rows[..., : mla.mla.kv_lora_rank]))
  assert expanded.shape == (2, 5, 4, 14)
  assert expanded.std() > 0.3
  np.testing.assert_allclose(absorbed, expanded, rtol=0, atol=1e-5)


def test_the_real_models_cache_has_1280_bytes_per_token_and_layer():
  """47 layers x (512 + 64) numbers in whole tiles of 128 x 2 bytes, and nothing per head."""
  assert page_bytes(GLM_4_7_FLASH, 64) == 47 * 64 * 640 * 2
  expanded = 47 * 20 * (192 + 64 + 256) * 2
  assert 64 * expanded / page_bytes(GLM_4_7_FLASH, 64) == 16
  assert page_bytes(QWEN3_30B_A3B.replace(dtype="bfloat16"), 64) == 48 * 64 * 2 * 4 * 128 * 2


def _shapes(jaxpr):
  """Shapes of everything that a program computes, inner programs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield tuple(variable.aval.shape)
    for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        yield from _shapes(inner)


def test_decoding_expands_no_cached_token():
  """No array of a decode step has cached tokens x heads x (nope or value) dimensions."""
  model = tiny_model(**GLM)
  slots, heads = 101, 4  # a length that no other axis has
  per_head = lambda shapes: [s for s in shapes if slots in s and heads in s and {10, 14, 18, 24} & set(s)]
  cache = PagedCache(init_pages(model.config, 2, slots), jnp.array([[0], [1]]))
  positions = jnp.zeros((2, 1), jnp.int32)
  program = jax.make_jaxpr(lambda tokens: model.hidden(tokens, None, positions, cache=cache).hidden)(positions)
  shapes = set(_shapes(program.jaxpr))
  assert any(slots in shape for shape in shapes)
  assert not per_head(shapes)
  expanded = jax.make_jaxpr(layer_of(model.runs[0].attention)._expanded)(jnp.zeros((2, slots, 28)))
  assert per_head(_shapes(expanded.jaxpr))
