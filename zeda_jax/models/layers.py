"""The small pieces every decoder is made of: linear maps, RMS norm, the dense MLP, rotary embeddings."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from zeda_jax.config import ModelConfig, RopeConfig
from zeda_jax.sharding import Sharding

_INIT_STD = 0.02


def normal_init(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
  return nnx.Param(_INIT_STD * jax.random.normal(rngs.params(), shape, jnp.float32))


class Linear(nnx.Module):
  """x @ kernel (+ bias), computed in x's dtype."""

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    bias: bool = False,
    rngs: nnx.Rngs,
    sharding: Sharding | None = None,
  ):
    self.sharding = sharding
    self.kernel = normal_init(rngs, (in_features, out_features))
    self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

  def __call__(self, x: Float[Array, "*b I"]) -> Float[Array, "*b O"]:
    kernel = self.kernel[...].astype(x.dtype)
    out = x @ kernel if self.sharding is None else self.sharding.on_rows(jnp.matmul, x, kernel)
    return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class Embedding(nnx.Module):
  def __init__(self, vocab_size: int, hidden_size: int, rngs: nnx.Rngs, sharding: Sharding | None = None):
    self.sharding = sharding
    self.embedding = normal_init(rngs, (vocab_size, hidden_size))

  def __call__(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T H"]:
    look_up = lambda tokens, table: table[tokens].astype(dtype)
    table = self.embedding[...]
    return look_up(tokens, table) if self.sharding is None else self.sharding.on_rows(look_up, tokens, table)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, with the statistics in fp32."""

  def __init__(self, features: int, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(features))

  def __call__(self, x: Float[Array, "*b H"]) -> Float[Array, "*b H"]:
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
    return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)


class DenseMLP(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x)); the layers that are not a mixture of experts, and shared experts."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, inner: int | None = None):
    hidden = config.hidden_size
    inner = config.intermediate_size if inner is None else inner
    options: Any = {"rngs": rngs, "sharding": config.sharding}
    self.gate_proj = Linear(hidden, inner, **options)
    self.up_proj = Linear(hidden, inner, **options)
    self.down_proj = Linear(inner, hidden, **options)

  def __call__(self, x: Float[Array, "*b H"]) -> Float[Array, "*b H"]:
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_frequencies(rope: RopeConfig, dim: int) -> tuple[Float[np.ndarray, " D/2"], float]:
  """Inverse frequencies and the factor that scales cos and sin (1 unless yarn).

  yarn (arXiv 2309.00071) interpolates the slow frequencies by `factor`, keeps the fast ones, and blends linearly in
  between; the corners are where a dimension turns beta_fast and beta_slow times within the original context.
  """
  exponents = np.arange(0, dim, 2, dtype=np.float32) / dim
  frequencies = 1.0 / (np.float32(rope.theta) ** exponents)
  if rope.type == "default":
    return frequencies, 1.0
  assert rope.factor is not None and rope.original_max_position_embeddings is not None

  context = rope.original_max_position_embeddings

  def corner(turns: float) -> float:
    return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

  low, high = corner(rope.beta_fast), corner(rope.beta_slow)
  if rope.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 1e-3), 0, 1)
  blended = frequencies / rope.factor * ramp + frequencies * (1 - ramp)
  return blended.astype(np.float32), _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
  if rope.attention_factor is not None:
    return rope.attention_factor
  assert rope.factor is not None
  if rope.mscale and rope.mscale_all_dim:
    return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
  return yarn_mscale(rope.factor)


def yarn_mscale(factor: float, slope: float = 1.0) -> float:
  return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0


def rope_tables(
  rope: RopeConfig, dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
  """cos and sin of each position's angles, in fp32; computed once and used by every layer."""
  frequencies, scale = rope_frequencies(rope, dim)
  angles = positions[..., None].astype(jnp.float32) * frequencies
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(
  x: Float[Array, "B T N D"], tables: tuple[Array, Array], interleaved: bool = False
) -> Float[Array, "B T N D"]:
  """Rotates the pairs (x[i], x[i + D/2]) of every head, or (x[2i], x[2i + 1]) where they are interleaved.

  Either way pair i comes out at (i, i + D/2): products of queries and keys do not depend on the order.
  """
  cos, sin = (t[:, :, None, :] for t in tables)
  wide = x.astype(jnp.float32)
  left, right = (wide[..., 0::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
