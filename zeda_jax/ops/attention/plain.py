"""Attention as three lines of XLA with a mask: for short rows. Makes [B, N, T, S] arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite, so that a row with nothing to attend to gives numbers, not NaN


def packed_mask(segment_ids: Int[Array, "B T"] | None, length: int) -> Bool[Array, "#B T T"]:
  """True where query t may see key s: s <= t, same segment, and not padding (segment 0)."""
  causal = jnp.tril(jnp.ones((length, length), bool))[None]
  if segment_ids is None:
    return causal
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  return causal & same & (segment_ids > 0)[:, None, :]


def masked_attention(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B S M D"],
  value: Float[Array, "B S M V"],
  mask: Bool[Array, "#B T S"],
  scale: float,
) -> Float[Array, "B T N V"]:
  """softmax(scale q k) v in fp32; N query heads share M key/value heads, N = M * any."""
  batch, length, heads, dim = query.shape
  groups = key.shape[2]
  query = query.reshape(batch, length, groups, heads // groups, dim) * scale
  logits = jnp.einsum("btmgd,bsmd->bmgts", query, key, preferred_element_type=jnp.float32)
  logits = jnp.where(mask[:, None, None], logits, _MASKED)
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  out = jnp.einsum("bmgts,bsmv->btmgv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
  # Dividing the D outputs instead of the S weights saves a pass over the largest array.
  out = out / jnp.einsum("bmgts->btmg", weights)[..., None]
  return out.reshape(batch, length, heads, value.shape[-1]).astype(value.dtype)
