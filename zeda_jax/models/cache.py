"""The cache of all layers: arrays that a jitted decode step can update in place."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from zeda_jax.config import ModelConfig
from zeda_jax.models.paged_cache import PagedCache


@struct.dataclass
class KVCache:
  """Keys and values by layer, row and slot; slot s of a row holds the token at position s of its sequence."""

  key: Float[Array, "L B S M D"]
  value: Float[Array, "L B S M D"]

  @property
  def length(self) -> int:
    return self.key.shape[2]


@struct.dataclass
class LatentCache:
  """Multi-head latent attention's cache: C = kv_lora_rank + rope_head_dim numbers per token, nothing per head."""

  latents: Float[Array, "L B S C"]

  @property
  def length(self) -> int:
    return self.latents.shape[2]


Cache = KVCache | LatentCache | PagedCache


def init_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype | None = None) -> KVCache | LatentCache:
  """An empty cache of the kind that the model's attention wants; `dtype` defaults to the activations'.

  Its rows are shared out over the devices of the model's sharding, where they divide evenly.
  """
  slots = (config.num_layers, batch, length)
  if config.mla is not None:
    width = config.mla.kv_lora_rank + config.mla.rope_head_dim
    return LatentCache(_by_rows(jnp.zeros((*slots, width), dtype or config.dtype), config))
  zeros = _by_rows(jnp.zeros((*slots, config.num_kv_heads, config.head_dim), dtype or config.dtype), config)
  return KVCache(key=zeros, value=zeros)


def _by_rows(store: Float[Array, "L B S *d"], config: ModelConfig) -> Float[Array, "L B S *d"]:
  sharding = config.sharding
  if sharding is None or store.shape[1] % sharding.num_devices:
    return store
  where = NamedSharding(sharding.mesh, PartitionSpec(None, sharding.rules.tokens))
  return jax.lax.with_sharding_constraint(store, where)


def update_cache(
  cache: KVCache,
  layer: Int[Array, ""],
  positions: Int[Array, "B T"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M D"],
) -> tuple[KVCache, Float[Array, "B S M D"], Float[Array, "B S M D"]]:
  """Writes one layer's new keys and values at `positions`; returns the cache and that layer's whole rows."""
  cache = KVCache(_write(cache.key, layer, positions, key), _write(cache.value, layer, positions, value))
  return cache, _layer_of(cache.key, layer), _layer_of(cache.value, layer)


def update_latents(
  cache: LatentCache, layer: Int[Array, ""], positions: Int[Array, "B T"], latents: Float[Array, "B T C"]
) -> tuple[LatentCache, Float[Array, "B S C"]]:
  """Writes one layer's new latents at `positions`; returns the cache and that layer's whole rows."""
  cache = LatentCache(_write(cache.latents, layer, positions, latents))
  return cache, _layer_of(cache.latents, layer)


def _write(
  store: Float[Array, "L B S *d"], layer: Int[Array, ""], positions: Int[Array, "B T"], new: Float[Array, "B T *d"]
) -> Float[Array, "L B S *d"]:
  """store[layer, b, positions[b, t]] = new[b, t]; positions past the end are dropped."""
  rows = jnp.arange(new.shape[0])[:, None]
  return store.at[layer, rows, positions].set(new.astype(store.dtype), mode="drop")


def _layer_of(store: Float[Array, "L *d"], layer: Int[Array, ""]) -> Float[Array, "*d"]:
  return jax.lax.dynamic_index_in_dim(store, layer, keepdims=False)
