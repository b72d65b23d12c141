"""Attention of one new token a row to pages of a cache: reads the pages that live, and little else.

The pages of all rows form one list, which is worked off in blocks with a running softmax (arXiv 2205.14135). So time
follows the number of tokens in the cache, not rows times the longest, and no row's keys are ever copied together; one
compiled program serves all lengths.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zeda_jax.ops.platforms import by_backend
from zeda_jax.ops.varying import vary_alike

_BLOCK_TOKENS = 2048  # cached tokens per block: enough to amortise its operations, few enough to stay in a CPU's cache
_MASKED = -1e30  # finite: differences of it are numbers, not NaN


def paged_attention(
  query: Float[Array, "B N D"],
  pages: tuple[Float[Array, "L P *M G D"], ...],
  layer: Int[Array, ""],
  table: Int[Array, "B W"],
  lengths: Int[Array, " B"],
  *,
  scale: float | None = None,
  value_dim: int | None = None,
  backend: str | None = None,
) -> Float[Array, "B N V"]:
  """softmax(scale q k) v over the first `lengths` tokens of each row, fp32 inside; N query heads share M of the cache.

  What pages hold beyond a row's length, NaN included, reaches nothing. A row of length 0 gives 0.

  Args:
    query: of one token a row.
    pages: keys and values, without the axis M where it is 1; or one array that holds both: the values are then the
      first `value_dim` of the D numbers.
    layer: which one of L to read.
    table: token t of row b lies in page table[b, t // G], place t % G. Entries past the length are not read.
    lengths: tokens that a row sees.
    scale: of the logits; None means 1 / sqrt(D).
    value_dim: see pages.
    backend: a name in BACKENDS; None takes the best of the platform that the program is compiled for.
  """
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  width = pages[-1].shape[-1] if value_dim is None else value_dim
  operands = vary_alike(query, layer, table, lengths, *pages)
  return by_backend(
    *operands,
    name=backend,
    platforms=None,
    of=lambda name: functools.partial(BACKENDS[name], scale=scale, width=width),
    defaults=DEFAULTS,
    elsewhere=ELSEWHERE,
    result=jax.ShapeDtypeStruct((*query.shape[:2], width), query.dtype),
    what="paged_attention",
    anywhere=ELSEWHERE,
  )


def blocks(
  query: Float[Array, "B N D"],
  layer: Int[Array, ""],
  table: Int[Array, "B W"],
  lengths: Int[Array, " B"],
  *pages: Float[Array, "L P *M G D"],
  scale: float,
  width: int,
) -> Float[Array, "B N V"]:
  """Ordinary XLA, for any device."""
  batch, heads, _ = query.shape
  _, num_pages, *some, page_size, _ = pages[0].shape
  groups = math.prod(some)
  query = query.reshape(batch, groups, heads // groups, -1) * scale
  flat = [p.reshape(-1, *p.shape[2:]) for p in pages]  # [L * P, *M, G, D]; joining more would copy a TPU's tiles
  # The last page of a row, which it may not fill, is apart from the full ones: only there is anything to be masked.
  full = jnp.maximum(lengths - 1, 0) // page_size
  ends = jnp.cumsum(full)  # the full pages of row b are the numbers ends[b] - full[b] .. ends[b] of the list
  size = max(1, min(_BLOCK_TOKENS // page_size, table.size))

  def attend(query: Array, row: Array, place: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Of one page per item: [I, M, Q, V] unscaled, sum and largest of the logits [I, M, Q]."""
    page = layer * num_pages + jnp.clip(table[row, place], 0, num_pages - 1)
    taken = [p[page].reshape(-1, groups, *p.shape[-2:]) for p in flat]
    key, value = taken[0], taken[0][..., :width] if len(taken) == 1 else taken[1]
    logits = jnp.einsum("imqd,imgd->imqg", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
      value = jnp.where(mask[:, None, :, None], value, 0)  # 0 * NaN would be NaN
      logits = jnp.where(mask[:, None, None], logits, _MASKED)
    largest = logits.max(axis=-1)
    weights = jnp.exp(logits - largest[..., None])
    if mask is not None:
      weights = jnp.where(mask[:, None, None], weights, 0)
    out = jnp.einsum("imqg,imgv->imqv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return out, weights.sum(axis=-1), largest

  def block(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    out, total, largest = carry
    item = i * size + jnp.arange(size)
    live = item < ends[-1]
    row = jnp.minimum((item[:, None] >= ends).sum(axis=-1), batch - 1)
    part, part_total, part_largest = attend(query[row], row, jnp.where(live, item - (ends - full)[row], 0), None)
    # Sums over the items of each row are products with 0 and 1: scatters are loops over the items on a CPU.
    of_row = live & (row == jnp.arange(batch)[:, None])  # [B, I]
    best = jnp.where(of_row[:, :, None, None], part_largest, _MASKED).max(axis=1)
    new_largest = jnp.maximum(largest, best)
    grow = jnp.exp(part_largest - new_largest[row])[..., None]
    parts = jnp.concatenate([part * grow, part_total[..., None] * grow], axis=-1)
    parts = jnp.where(live[:, None, None, None], parts, 0)
    added = jnp.einsum("bi,i...->b...", of_row.astype(jnp.float32), parts, precision="highest")
    shrink = jnp.exp(largest - new_largest)
    return shrink[..., None] * out + added[..., :-1], shrink * total + added[..., -1], new_largest

  rows = jnp.arange(batch)
  last = attend(query, rows, full, jnp.arange(page_size) < (lengths - full * page_size)[:, None])
  out, total, _ = jax.lax.fori_loop(0, -(-ends[-1] // size), block, last)
  out = out / jnp.where(total == 0, 1, total)[..., None]
  return out.reshape(batch, heads, width).astype(query.dtype)


# name -> (query, layer, table, lengths, *pages, scale=, width=) -> output
BACKENDS = {"blocks": blocks}
DEFAULTS: dict[str, str] = {}  # the best backend of a platform; the others take ELSEWHERE
ELSEWHERE = "blocks"
