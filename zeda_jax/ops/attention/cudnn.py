"""cuDNN's fused attention on NVIDIA GPUs, through jax.nn.

Its interface there knows no segment ids, and as a mask they would be an array of T^2 numbers. So the queries of a
packed row are taken in blocks, each with the keys up to its end and a mask of its own: no array grows with T^2, and
most of what causality hides is left out.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 4096  # queries with one mask: 256 MiB of bf16 at 32k keys


def supports(query: Float[Array, "B T N D"], key: Float[Array, "B T M D"], value: Float[Array, "B T M V"]) -> str:
  """Empty if cuDNN can differentiate attention over these arrays here, else why not, in the words of JAX."""
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 or float16, not in {query.dtype}"
  run = functools.partial(forward, scale=1.0)
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
  shapes.append(jax.ShapeDtypeStruct(query.shape[:2], jnp.int32))
  try:
    jax.eval_shape(jax.grad(lambda *arrays: run(*arrays)[0].astype(jnp.float32).sum(), argnums=(0, 1, 2)), *shapes)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
  return ""


def forward(
  query: Float[Array, "B T N D"],
  key: Float[Array, "B T M D"],
  value: Float[Array, "B T M V"],
  segment_ids: Int[Array, "B T"] | None = None,
  *,
  scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
  """The output, and zeros: `backward` needs no denominators. Padding sees the padding before it."""
  batch, length, heads, dim = query.shape
  width = max(dim, value.shape[-1])
  width += -width % 8
  q, k, v = (_widened(x, width, length % 2) for x in (query, key, value))
  attend = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
  if segment_ids is None:
    out = attend(q, k, v, is_causal=True)
  else:
    out = _by_blocks(attend, q, k, v, jnp.pad(segment_ids, ((0, 0), (0, length % 2))))
  return out[:, :length, :, : value.shape[-1]], jnp.zeros((batch, heads, length), jnp.float32)


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
) -> tuple[Float[Array, "B T N D"], Float[Array, "B T M D"], Float[Array, "B T M V"]]:
  """Gradients of query, key and value. jax.nn hands out no backward kernel alone, so the forward one runs again."""
  del out, lse
  run = lambda q, k, v: forward(q, k, v, segment_ids, scale=scale)[0]
  return jax.vjp(run, query, key, value)[1](grad)


def _by_blocks(
  attend: Callable[..., Array], query: Array, key: Array, value: Array, segments: Int[Array, "B T"]
) -> Float[Array, "B T N V"]:
  """`attend` for one block of queries after the other. The mask is made again in the backward pass, not kept."""

  @functools.partial(jax.checkpoint, static_argnums=(3, 4))
  def block(query: Array, key: Array, value: Array, start: int, end: int) -> Array:
    return attend(query, key, value, mask=_mask(segments, start, end))

  length, blocks = query.shape[1], []
  for start in range(0, length, BLOCK):
    end = min(start + BLOCK, length)
    blocks.append(block(query[:, start:end], key[:, :end], value[:, :end], start, end))
  return jnp.concatenate(blocks, axis=1)


def _mask(segments: Int[Array, "B T"], start: int, end: int) -> Bool[Array, "B 1 q k"]:
  """Queries start .. end against keys 0 .. end. Every query sees at least itself, padding included."""
  causal = jnp.arange(end) <= jnp.arange(start, end)[:, None]
  return (causal & (segments[:, start:end, None] == segments[:, None, :end]))[:, None]


def _widened(x: Float[Array, "B T N D"], width: int, more_tokens: int) -> Array:
  """Zeros up to a width that keys and values share, and up to an even length: what cuDNN takes."""
  return jnp.pad(x, ((0, 0), (0, more_tokens), (0, 0), (0, width - x.shape[-1])))
