"""Rotary embeddings against transformers' own tables; norms and the dense MLP against plain numpy."""

import flax.nnx as nnx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding, apply_rotary_pos_emb

from tests.tiny_models import TINY, tiny_config
from zeda_jax.config import from_hf
from zeda_jax.models.layers import DenseMLP, RMSNorm, apply_rope, rope_frequencies, rope_tables

QWEN = TINY["qwen3_moe"]
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}

ROPES = {
  "default": {"rope_type": "default", "rope_theta": 1e4},
  "large theta": {"rope_type": "default", "rope_theta": 1e7},
  "yarn": YARN,
  "factor 1": YARN | {"factor": 1.0},
  "factor below 1": YARN | {"factor": 0.5},
  "original taken from the context": {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"},
  "long original": YARN | {"original_max_position_embeddings": 32768, "factor": 32.0},
  "corners past the last dimension": YARN | {"rope_theta": 10.0, "original_max_position_embeddings": 10**9},
  "beta": YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
  "equal corners": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
  "attention factor": YARN | {"attention_factor": 0.7},
  "mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
  "mscale 0": YARN | {"mscale": 0.7, "mscale_all_dim": 0.0},
  "mscale alone": YARN | {"mscale": 0.7},
  "not truncated": YARN | {"truncate": False},
}


@pytest.mark.parametrize("head_dim", [6, 16, 128])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_rope_equals_that_of_transformers(rope, head_dim):
  stock_config = Qwen3MoeConfig(**(QWEN | {"head_dim": head_dim, "rope_parameters": dict(rope)}))
  stock = Qwen3MoeRotaryEmbedding(stock_config)
  config = from_hf({"model_type": "qwen3_moe", **QWEN, "rope_parameters": rope, "head_dim": head_dim})
  frequencies, scale = rope_frequencies(config.rope, head_dim)
  np.testing.assert_allclose(frequencies, stock.inv_freq.numpy(), rtol=1e-5)
  np.testing.assert_allclose(scale, stock.attention_scaling, rtol=1e-6)
  positions = np.array([[0, 1, 5, 100], [7, 6, 2, 3]])
  query = np.random.default_rng(0).standard_normal((2, 4, 3, head_dim), np.float32)
  cos, sin = stock(torch.zeros(1), torch.tensor(positions))
  expected, _ = apply_rotary_pos_emb(torch.tensor(query), torch.tensor(query), cos, sin, unsqueeze_dim=2)
  found = apply_rope(jnp.asarray(query), rope_tables(config.rope, head_dim, jnp.asarray(positions)))
  np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=2e-5 * max(1.0, scale))


def test_interleaved_pairs_come_out_as_halves():
  query = np.random.default_rng(0).standard_normal((2, 4, 3, 8), np.float32)
  tables = rope_tables(from_hf({"model_type": "qwen3_moe", **QWEN}).rope, 8, jnp.arange(8).reshape(2, 4))
  halves = np.concatenate([query[..., 0::2], query[..., 1::2]], axis=-1)
  found = apply_rope(jnp.asarray(query), tables, interleaved=True)
  np.testing.assert_array_equal(found, apply_rope(jnp.asarray(halves), tables))


def plain_rms_norm(x, scale, eps):
  x = np.asarray(x, np.float64)
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def test_rms_norm():
  norm = RMSNorm(8, eps=1e-2)
  norm.scale[...] = jnp.arange(8.0)
  x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
  np.testing.assert_allclose(norm(jnp.asarray(x)), plain_rms_norm(x, np.arange(8), 1e-2), rtol=1e-5)
  narrow = jnp.asarray(1000 * x, jnp.bfloat16)
  out = norm(narrow)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, float), plain_rms_norm(narrow, np.arange(8), 1e-2), rtol=2**-7)


def test_dense_mlp():
  mlp = DenseMLP(tiny_config(), nnx.Rngs(0))
  x = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
  gate, up, down = (np.asarray(m.kernel[...], float) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
  gated = x @ gate
  expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
  np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-6)
