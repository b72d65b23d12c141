"""Latent attention: both forms give the same, the cache holds latents alone, decoding expands nothing per head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_models import GLM, GLM_4_7_FLASH, QWEN3_30B_A3B, forward, layer_of, random_tokens, tiny_model
from zeda_jax.models.cache import LatentCache, init_cache
from zeda_jax.models.decoder import inject
from zeda_jax.models.mla import absorbing_is_cheaper
from zeda_jax.models.params import merge_model, split_model
from zeda_jax.ops.attention import cached_attention


@pytest.fixture(scope="module")
def model():
  return inject(tiny_model(**GLM), 3)


def test_both_forms_agree():
  mla = layer_of(tiny_model(**GLM).runs[0].attention)
  rng = np.random.default_rng(0)
  query, latents = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 5, 4, 18), (2, 9, 28)))
  positions = jnp.array([[0, 2, 4, 6, 8], [1, 3, 5, 7, 8]])
  expanded = cached_attention(query, *mla._expanded(latents), positions, scale=mla.scale)
  rows = latents[:, :, None]
  attend = lambda query: cached_attention(query, rows, rows[..., : mla.mla.kv_lora_rank], positions, scale=mla.scale)
  absorbed = mla._absorbed(query, attend)
  assert expanded.shape == (2, 5, 4, 14)
  assert expanded.std() > 0.3
  np.testing.assert_allclose(absorbed, expanded, rtol=0, atol=1e-5)


def test_one_query_is_absorbed_and_many_are_expanded():
  flash = GLM_4_7_FLASH.mla
  assert [absorbing_is_cheaper(flash, n) for n in (1, 64, 398, 399, 4096)] == [True, True, True, False, False]
  small = GLM["mla"]
  assert [absorbing_is_cheaper(small, n) for n in (1, 29, 30)] == [True, True, False]


def test_the_real_models_cache_has_1152_bytes_per_token_and_layer():
  """47 layers x (512 + 64) numbers x 2 bytes, and nothing per head."""
  cache = jax.eval_shape(lambda: init_cache(GLM_4_7_FLASH, batch=1, length=1))
  assert isinstance(cache, LatentCache)
  assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache)] == [((47, 1, 1, 576), jnp.bfloat16)]
  per_token = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
  assert per_token == 47 * (512 + 64) * 2 == 54_144
  expanded = 47 * 20 * (192 + 64 + 256) * 2
  assert expanded / per_token > 17
  qwen = jax.eval_shape(lambda: init_cache(QWEN3_30B_A3B.replace(dtype="bfloat16"), batch=1, length=1))
  assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(qwen)) == 48 * 2 * 4 * 128 * 2


def _shapes(jaxpr):
  """Shapes of everything that a program computes, inner programs included."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield tuple(variable.aval.shape)
    for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
      inner = getattr(parameter, "jaxpr", parameter)
      if hasattr(inner, "eqns"):
        yield from _shapes(inner)


@pytest.mark.parametrize(("queries", "expands"), [(1, False), (16, False), (32, True)])
def test_decoding_expands_no_cached_token(model, queries, expands):
  """No array of a decode step has cached tokens x heads x (nope or value) dimensions."""
  slots, heads = 101, 4  # a length that no other axis has
  cache = init_cache(model.config, 2, slots)
  positions = jnp.zeros((2, queries), jnp.int32)
  program = jax.make_jaxpr(lambda tokens: model.hidden(tokens, None, positions, cache=cache).hidden)(positions)
  shapes = set(_shapes(program.jaxpr))
  assert any(slots in shape for shape in shapes)
  per_head = [s for s in shapes if slots in s and heads in s and {10, 14, 18, 24} & set(s)]
  assert bool(per_head) == expands


def test_a_cache_filled_in_steps_gives_the_same(model):
  """A long prefill (expanded), a short one and single tokens (absorbed) against the forward pass without a cache."""
  tokens = random_tokens((2, 44))
  graphdef, params = split_model(model)
  step = jax.jit(lambda p, *inputs, cache: merge_model(graphdef, p).hidden(*inputs, cache=cache))
  cache, found, start = init_cache(model.config, 2, 44), [], 0
  for size in (32, 8, 1, 1, 1, 1):
    positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
    out = step(params, tokens[:, start : start + size], None, positions, cache=cache)
    cache, start = out.cache, start + size
    found.append(model.logits(out.hidden))
  np.testing.assert_allclose(jnp.concatenate(found, axis=1), forward(model, tokens).logits, rtol=0, atol=1e-4)
