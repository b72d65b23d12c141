"""Grouped-query attention with normalised queries and keys (Qwen3, OLMoE)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from zeda_jax.config import ModelConfig
from zeda_jax.models.layers import Linear, RMSNorm, apply_rope
from zeda_jax.models.paged_cache import PagedCache
from zeda_jax.ops.attention import attention


class Attention(nnx.Module):
  """q, k, v projections, RMS norm of q and k (per head or over all heads), RoPE, attention, output projection."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    hidden, dim = config.hidden_size, config.head_dim
    options: Any = {"bias": config.attention_bias, "rngs": rngs, "sharding": config.sharding}
    self.config = config
    self.q_proj = Linear(hidden, config.num_heads * dim, **options)
    self.k_proj = Linear(hidden, config.num_kv_heads * dim, **options)
    self.v_proj = Linear(hidden, config.num_kv_heads * dim, **options)
    self.o_proj = Linear(config.num_heads * dim, hidden, **options)
    q_normed, k_normed = (dim, dim) if config.qk_norm == "head" else (config.num_heads * dim, config.num_kv_heads * dim)
    self.q_norm = RMSNorm(q_normed, config.rms_norm_eps)
    self.k_norm = RMSNorm(k_normed, config.rms_norm_eps)

  def __call__(
    self,
    x: Float[Array, "B T H"],
    rope: tuple[Array, Array],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""],
    cache: PagedCache | None,
  ) -> tuple[Float[Array, "B T H"], PagedCache | None]:
    """With a cache, the new keys and values are written to it and the queries see its row up to their positions."""
    query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
    if self.config.qk_norm == "projection":
      query, key = self.q_norm(query), self.k_norm(key)
    if self.config.clip_qkv is not None:
      query, key, value = (jnp.clip(y, -self.config.clip_qkv, self.config.clip_qkv) for y in (query, key, value))
    query, key, value = (y.reshape(*x.shape[:2], -1, self.config.head_dim) for y in (query, key, value))
    if self.config.qk_norm == "head":
      query, key = self.q_norm(query), self.k_norm(key)
    query, key = apply_rope(query, rope), apply_rope(key, rope)
    if cache is None:
      out = attention(query, key, value, segment_ids)
    else:
      cache = cache.write(layer, positions, segment_ids, key, value)
      if cache.fresh:
        out = attention(query, key, value, segment_ids)
      else:
        out = cache.attend(query, layer, positions, segment_ids)
    return self.o_proj(out.reshape(*x.shape[:2], -1)), cache
