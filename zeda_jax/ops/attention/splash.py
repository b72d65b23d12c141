"""JAX's splash attention kernels for TPUs: blocks above the diagonal are never visited, segments are masked inside.

Forward and backward kernels are called one by one, since the platform that decides on them is known only when either is
lowered. `_splash_attention_bwd` is what the library's own gradient calls.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import config as jax_config
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

BLOCK = 512  # of queries and of keys; with 256 wide heads it fits the VMEM of every TPU generation from v5e on
_LANES = 128


def forward(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M V"],
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float,
  interpret: bool = False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
  """The output and the logarithm of each softmax's denominator. Padding sees the padding before it."""
  length, width = query.shape[1], value.shape[-1]
  kernel = _kernel(query.shape[2], _padded(length, _block(length)), interpret)
  q, k, v = (_to_kernel(x, length) for x in (query * scale, key, value))
  with _any_mesh_axes():
    out, (lse,) = jax.vmap(kernel)(q, k, v, _segments(segment_ids, length))
  return _from_kernel(out, length, width), lse[:, :, :length]


def backward(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M V"],
  out: Float[Array, "B T N V"],
  lse: Float[Array, "B N T"],
  grad: Float[Array, "B T N V"],
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float,
  interpret: bool = False,
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T M D"], Float[Array, "B T M V"]]:
  """Gradients of query, key and value, for the gradient of `out`."""
  length, dim, width = query.shape[1], query.shape[-1], value.shape[-1]
  kernel = _kernel(query.shape[2], _padded(length, _block(length)), interpret)
  q, k, v, out, grad = (_to_kernel(x, length) for x in (query * scale, key, value, out, grad))
  # Rows that are added have lse 0: their logits are 0, too, and their `grad` is, so nothing comes of them.
  lse = jnp.pad(lse, ((0, 0), (0, 0), (0, q.shape[2] - length)))

  def run(q, k, v, segments, out, lse, grad):
    options = kernel.kwargs | {"save_residuals": False}
    residuals = (q, k, v, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
    return kernels._splash_attention_bwd(**options, res=residuals, do=grad)[3:6]

  with _any_mesh_axes():
    d_query, d_key, d_value = jax.vmap(run)(q, k, v, _segments(segment_ids, length), out, lse, grad)
  d_query = scale * _from_kernel(d_query, length, dim)
  return d_query, _from_kernel(d_key, length, dim), _from_kernel(d_value, length, width)


def _any_mesh_axes() -> Any:
  """Lets the library's kernels, which do not say over which mesh axes they vary, into a shard_map that checks it."""
  return jax_config._check_vma(False)


def _kernel(heads: int, length: int, interpret: bool) -> kernels.SplashAttentionKernel:
  block = _block(length)
  return kernels.make_splash_mha(
    masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
    block_sizes=kernels.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    save_residuals=True,
    interpret=interpret,
  )


def _block(length: int) -> int:
  return min(BLOCK, _padded(length, _LANES))


def _padded(size: int, multiple: int) -> int:
  return math.ceil(size / multiple) * multiple


def _to_kernel(x: Float[Array, "B T N D"], length: int) -> Float[Array, "B N t d"]:
  """Heads before tokens, with zeros up to a whole block of tokens and a multiple of 128 numbers a head."""
  more_tokens = _padded(length, _block(length)) - length
  more_numbers = _padded(x.shape[-1], _LANES) - x.shape[-1]
  return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more_tokens), (0, more_numbers)))


def _from_kernel(x: Float[Array, "B N t d"], length: int, width: int) -> Float[Array, "B T N D"]:
  return x[:, :, :length, :width].swapaxes(1, 2)


def _segments(segment_ids: Int[Array, "B T"] | None, length: int) -> kernels.SegmentIds | None:
  if segment_ids is None:  # added keys come after all queries that count, so causality hides them
    return None
  more = _padded(length, _block(length)) - length
  ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, more)))
  return kernels.SegmentIds(ids, ids)
