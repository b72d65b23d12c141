"""Grouped-query attention with normalised queries and keys (Qwen3)."""

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from zeda_jax.config import ModelConfig
from zeda_jax.models.cache import KVCache, update_cache
from zeda_jax.models.layers import Linear, RMSNorm, apply_rope
from zeda_jax.ops.attention import attention


class Attention(nnx.Module):
  """q, k, v projections, per-head RMS norm of q and k, RoPE, attention, output projection."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    hidden, dim, bias = config.hidden_size, config.head_dim, config.attention_bias
    self.head_dim = dim
    self.q_proj = Linear(hidden, config.num_heads * dim, bias=bias, rngs=rngs)
    self.k_proj = Linear(hidden, config.num_kv_heads * dim, bias=bias, rngs=rngs)
    self.v_proj = Linear(hidden, config.num_kv_heads * dim, bias=bias, rngs=rngs)
    self.o_proj = Linear(config.num_heads * dim, hidden, bias=bias, rngs=rngs)
    self.q_norm = RMSNorm(dim, config.rms_norm_eps)
    self.k_norm = RMSNorm(dim, config.rms_norm_eps)

  def __call__(
    self,
    x: Float[Array, "B T H"],
    rope: tuple[Array, Array],
    mask: Bool[Array, "#B T S"],
    positions: Int[Array, "B T"],
    layer: Int[Array, ""],
    cache: KVCache | None,
  ) -> tuple[Float[Array, "B T H"], KVCache | None]:
    """With a cache, the new keys and values are written to it and the queries see all of its row."""
    heads = (*x.shape[:2], -1, self.head_dim)
    query = apply_rope(self.q_norm(self.q_proj(x).reshape(heads)), rope)
    key = apply_rope(self.k_norm(self.k_proj(x).reshape(heads)), rope)
    value = self.v_proj(x).reshape(heads)
    if cache is not None:
      cache, key, value = update_cache(cache, layer, positions, key, value)
    out = attention(query, key, value, mask)
    return self.o_proj(out.reshape(*x.shape[:2], -1)), cache
