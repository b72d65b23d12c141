"""The key/value cache of all layers: one pair of arrays that a jitted decode step can update in place."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from zeda_jax.config import ModelConfig


@struct.dataclass
class KVCache:
  """Keys and values by layer, row and slot; slot s of a row holds the token at position s of its sequence."""

  key: Float[Array, "L B S M D"]
  value: Float[Array, "L B S M D"]

  @property
  def length(self) -> int:
    return self.key.shape[2]


def init_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype | None = None) -> KVCache:
  """An empty cache; `dtype` defaults to the activations'."""
  shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
  zeros = jnp.zeros(shape, dtype or config.dtype)
  return KVCache(key=zeros, value=zeros)


def update_cache(
  cache: KVCache,
  layer: Int[Array, ""],
  positions: Int[Array, "B T"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M D"],
) -> tuple[KVCache, Float[Array, "B S M D"], Float[Array, "B S M D"]]:
  """Writes one layer's new keys and values at `positions`; returns the cache and that layer's whole rows."""
  rows = jnp.arange(key.shape[0])[:, None]

  def write(store: Array, new: Array) -> Array:
    return store.at[layer, rows, positions].set(new.astype(store.dtype), mode="drop")

  cache = KVCache(key=write(cache.key, key), value=write(cache.value, value))
  pick = lambda store: jax.lax.dynamic_index_in_dim(store, layer, keepdims=False)
  return cache, pick(cache.key), pick(cache.value)
