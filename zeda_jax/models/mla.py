"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; GLM-4.7-Flash).

A token leaves one latent vector and one rotary key behind, both shared by all heads; a head's keys and values are
linear maps of the latent. Two forms give the same numbers:

  expanded   keys = [W_K latent, rotary key], values = W_V latent, ordinary attention            (training, prefill)
  absorbed   queries [W_K^T q, rotary q] against [latent, rotary key], values = latent, then W_V (decode)

The cache holds only the latents and rotary keys. In the absorbed form nothing is ever expanded per head and cached
token: it is attention with a single key/value head of kv_lora_rank + rope_head_dim dimensions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from zeda_jax.config import ModelConfig, RopeConfig
from zeda_jax.models.layers import Linear, RMSNorm, apply_rope, yarn_mscale
from zeda_jax.models.paged_cache import PagedCache
from zeda_jax.ops.attention import attention

_LATENT_EPS = 1e-6  # of the two latent norms, whatever the model's rms_norm_eps is


class MLA(nnx.Module):
  """Latent projections, RoPE on a part of each head, attention in either form, output projection."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    assert config.mla is not None
    mla, hidden, heads = config.mla, config.hidden_size, config.num_heads
    options: Any = {"rngs": rngs, "sharding": config.sharding}
    with_bias = options | {"bias": config.attention_bias}
    self.mla, self.num_heads = mla, heads
    self.scale = _softmax_scale(config.rope, config.head_dim)
    if mla.q_lora_rank is None:
      self.q_proj = Linear(hidden, heads * config.head_dim, **options)
    else:
      self.q_a_proj = Linear(hidden, mla.q_lora_rank, **with_bias)
      self.q_a_norm = RMSNorm(mla.q_lora_rank, _LATENT_EPS)
      self.q_b_proj = Linear(mla.q_lora_rank, heads * config.head_dim, **options)
    self.kv_a_proj = Linear(hidden, mla.kv_lora_rank + mla.rope_head_dim, **with_bias)
    self.kv_a_norm = RMSNorm(mla.kv_lora_rank, _LATENT_EPS)
    self.kv_b_proj = Linear(mla.kv_lora_rank, heads * (mla.nope_head_dim + mla.v_head_dim), **options)
    self.o_proj = Linear(heads * mla.v_head_dim, hidden, **with_bias)

  def __call__(
    self,
    x: Float[Array, "B T H"],
    rope: tuple[Array, Array],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""],
    cache: PagedCache | None,
  ) -> tuple[Float[Array, "B T H"], PagedCache | None]:
    """With a cache, the new latents are written to it and the queries see its row up to their positions."""
    query, latents = self._queries(x, rope), self._latents(x, rope)
    if cache is None:
      out = attention(query, *self._expanded(latents), segment_ids, scale=self.scale)
    else:
      cache, out = self._paged(query, latents, segment_ids, positions, layer, cache)
    return self.o_proj(out.reshape(*x.shape[:2], -1)), cache

  def _queries(self, x: Float[Array, "B T H"], rope: tuple[Array, Array]) -> Float[Array, "B T N D"]:
    direct = self.mla.q_lora_rank is None
    query = self.q_proj(x) if direct else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
    nope, rotary = jnp.split(query.reshape(*x.shape[:2], self.num_heads, -1), [self.mla.nope_head_dim], axis=-1)
    return jnp.concatenate([nope, apply_rope(rotary, rope, self.mla.rope_interleave)], axis=-1)

  def _latents(self, x: Float[Array, "B T H"], rope: tuple[Array, Array]) -> Float[Array, "B T C"]:
    """What is cached of each token: the normalised latent and the rotary key, C = kv_lora_rank + rope_head_dim."""
    latent, rotary = jnp.split(self.kv_a_proj(x), [self.mla.kv_lora_rank], axis=-1)
    rotary = apply_rope(rotary[:, :, None], rope, self.mla.rope_interleave)[:, :, 0]
    return jnp.concatenate([self.kv_a_norm(latent), rotary], axis=-1)

  def _expanded(self, latents: Float[Array, "B S C"]) -> tuple[Float[Array, "B S N D"], Float[Array, "B S N V"]]:
    """Keys and values of every head."""
    latent, rotary = jnp.split(latents, [self.mla.kv_lora_rank], axis=-1)
    expanded = self.kv_b_proj(latent).reshape(*latent.shape[:2], self.num_heads, -1)
    nope, value = jnp.split(expanded, [self.mla.nope_head_dim], axis=-1)
    rotary = jnp.broadcast_to(rotary[:, :, None], (*nope.shape[:3], self.mla.rope_head_dim))
    return jnp.concatenate([nope, rotary], axis=-1), value

  def _paged(
    self,
    query: Float[Array, "B T N D"],
    latents: Float[Array, "B T C"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""],
    cache: PagedCache,
  ) -> tuple[PagedCache, Float[Array, "B T N V"]]:
    cache = cache.write(layer, positions, segment_ids, latents[:, :, None])
    if cache.fresh:
      return cache, attention(query, *self._expanded(latents), segment_ids, scale=self.scale)
    attend = lambda query: cache.attend(
      query, layer, positions, segment_ids, scale=self.scale, value_dim=self.mla.kv_lora_rank
    )
    return cache, self._absorbed(query, attend)

  def _absorbed(
    self, query: Float[Array, "B T N D"], attend: Callable[[Float[Array, "B T N C"]], Float[Array, "B T N R"]]
  ) -> Float[Array, "B T N V"]:
    """`attend` gives the weighted sum of latents for queries against latents and rotary keys."""
    rank, nope_dim = self.mla.kv_lora_rank, self.mla.nope_head_dim
    # kv_b_proj, by head: to_key [R, N, nope] and to_value [R, N, V]
    kernel = self.kv_b_proj.kernel[...].astype(query.dtype).reshape(rank, self.num_heads, -1)
    to_key, to_value = jnp.split(kernel, [nope_dim], axis=-1)
    with jax.named_scope("absorb"):
      nope, rotary = jnp.split(query, [nope_dim], axis=-1)
      query = jnp.concatenate([jnp.einsum("btnd,rnd->btnr", nope, to_key), rotary], axis=-1)
    return jnp.einsum("btnr,rnv->btnv", attend(query), to_value)


def _softmax_scale(rope: RopeConfig, head_dim: int) -> float:
  """1 / sqrt(D), times yarn's mscale squared where that is given for all dimensions."""
  if rope.type == "default" or not rope.mscale_all_dim:
    return head_dim**-0.5
  assert rope.factor is not None
  return head_dim**-0.5 * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
