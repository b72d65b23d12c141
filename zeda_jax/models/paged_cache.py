"""A cache in pages, so that memory follows the real lengths of the sequences in it.

Pages belong to no row by themselves: a table says where each row's tokens lie, and rows may share pages that they only
read. Who owns which page is decided on the host (rollout/pages.py).

On a mesh, rows and pages are shared out alike: a device holds the pages of its own rows, and the numbers in the table
count that device's pages only.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from zeda_jax.config import ModelConfig
from zeda_jax.ops.attention.paged import paged_attention
from zeda_jax.sharding import Sharding

# One head has no axis M: XLA drops axes of one by itself, but with a copy of all pages in every layer.
Pages = tuple[Float[Array, "L P *M G D"], ...]

_TILE = 128


@struct.dataclass
class PagedCache:
  """Pages of all layers, and which of them the rows of one forward pass use.

  Attributes:
    pages: (keys, values), or (latents,) of multi-head latent attention, which has one head; G tokens to a page. D may
      be wider than what is written, which is then followed by zeros.
    table: token t of sequence i lies in page table[i, t // G], place t % G. A row of the pass has S sequences, which
      are segments 1 .. S of it: segment s of row b is sequence b S + s - 1.
    fresh: the sequences begin with this pass, so that their tokens see each other and nothing that was there before.
    sharding: of the model.
  """

  pages: Pages
  table: Int[Array, "B*S W"]
  fresh: bool = struct.field(pytree_node=False, default=False)
  sharding: Sharding | None = struct.field(pytree_node=False, default=None)

  def write(
    self,
    layer: Int[Array, ""],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    *new: Float[Array, "B T M D"],
  ) -> "PagedCache":
    """Puts one layer's new tokens at their positions; padding (segment 0) and what has no page goes nowhere."""
    segments = jnp.ones(positions.shape, jnp.int32) if segment_ids is None else segment_ids
    run = self._on_rows(_write, (1,) * len(self.pages) + (None, 0, 0, 0) + (0,) * len(new), len(self.pages))
    pages = run(*self.pages, layer, self.table, positions, segments, *new)
    return self.replace(pages=pages)  # type: ignore[attr-defined]

  def attend(
    self,
    query: Float[Array, "B 1 N D"],
    layer: Int[Array, ""],
    positions: Int[Array, "B 1"],
    segment_ids: Int[Array, "B 1"] | None,
    *,
    scale: float | None = None,
    value_dim: int | None = None,
  ) -> Float[Array, "B 1 N V"]:
    """Attention of one token a row to its row up to itself; see `paged_attention`. Padding gives 0."""
    lengths = positions[:, 0] + 1
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = _padded(query, self.pages[0])
    if segment_ids is not None:
      lengths = jnp.where(segment_ids[:, 0] > 0, lengths, 0)
    function = functools.partial(_attend, scale=scale, value_dim=value_dim)
    run = self._on_rows(function, (0, None, 0, 0) + (1,) * len(self.pages), None)
    return run(query[:, 0], layer, self.table, lengths, *self.pages)[:, None]

  def _on_rows(self, function: Callable, cut: tuple[int | None, ...], pages_out: int | None) -> Callable:
    """`function` on each device's own rows and pages; cut[i] is the axis of argument i that is shared out."""
    if self.sharding is None:
      return function
    tokens = self.sharding.rules.tokens
    spec = lambda axis: PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, tokens)
    out_specs = spec(0) if pages_out is None else (spec(1),) * pages_out
    return jax.shard_map(
      function, mesh=self.sharding.mesh, in_specs=tuple(map(spec, cut)), out_specs=out_specs, check_vma=False
    )


def init_pages(config: ModelConfig, num_pages: int, page_size: int, dtype: jnp.dtype | None = None) -> Pages:
  """Empty pages for the model's kind of attention; `dtype` defaults to the activations'.

  With `config.sharding`, they are shared out over all devices, which must divide num_pages.
  """
  dtype = jnp.dtype(dtype or config.dtype)
  num_heads, widths = config.num_kv_heads, [config.head_dim] * 2
  if config.mla is not None:
    num_heads, widths = 1, [_whole_tiles(config.mla.kv_lora_rank + config.mla.rope_head_dim)]
  heads = () if num_heads == 1 else (num_heads,)
  shapes = [(config.num_layers, num_pages, *heads, page_size, width) for width in widths]
  make = lambda: tuple(jnp.zeros(shape, dtype) for shape in shapes)
  return jax.jit(make, out_shardings=pages_sharding(config.sharding))()


def _whole_tiles(width: int) -> int:
  """A TPU holds rows in tiles of 128 numbers. Where they would be broken, its compiler gives the array another layout
  and turns the whole cache around before and after each program."""
  return width if width < _TILE else -(-width // _TILE) * _TILE


def pages_sharding(sharding: Sharding | None) -> NamedSharding | None:
  return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(None, sharding.rules.tokens))


def page_bytes(config: ModelConfig, page_size: int) -> int:
  """Memory of one page of all layers."""
  pages = jax.eval_shape(lambda: init_pages(config.replace(sharding=None), 1, page_size))
  return sum(math.prod(p.shape) * p.dtype.itemsize for p in pages)


def copy_pages(pages: Pages, source: Int[Array, " C"], target: Int[Array, " C"], sharding: Sharding | None) -> Pages:
  """Copies whole pages of all layers. Pairs whose target is no page are skipped; on a mesh, the pairs are shared out
  like rows, and each device copies among its own pages."""
  cache = PagedCache(pages, source[:, None], sharding=sharding)
  run = cache._on_rows(_copy, (1,) * len(pages) + (0, 0), len(pages))
  return run(*pages, source, target)


def _copy(*arguments: Array) -> Pages:
  *pages, source, target = arguments
  last = pages[0].shape[1] - 1
  return tuple(p.at[:, target].set(p[:, jnp.minimum(source, last)], mode="drop") for p in pages)


def _padded(x: Array, pages: Array) -> Array:
  """With zeros up to the width of the pages."""
  missing = pages.shape[-1] - x.shape[-1]
  return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _write(*arguments: Array) -> Pages:
  count = (len(arguments) - 4) // 2
  pages, (layer, table, positions, segments), new = arguments[:count], arguments[count:-count], arguments[-count:]
  num_pages, page_size = pages[0].shape[1], pages[0].shape[-2]
  rows = positions.shape[0]
  sequence = jnp.arange(rows)[:, None] * (table.shape[0] // rows) + jnp.maximum(segments, 1) - 1
  place = positions // page_size
  page = table[sequence, jnp.minimum(place, table.shape[1] - 1)]
  page = jnp.where((segments > 0) & (place < table.shape[1]), page, num_pages)
  at = positions % page_size

  def put(p: Array, x: Array) -> Array:
    x = _padded(x, p).astype(p.dtype)
    if p.ndim == 4:
      return p.at[layer, page, at].set(x[:, :, 0], mode="drop")
    # Heads have an index, too, though all are written: what is left to each index is one row of memory. A TPU's
    # compiler would otherwise turn the whole cache around before and after.
    return p.at[layer, page[..., None], jnp.arange(p.shape[2]), at[..., None]].set(x, mode="drop")

  return tuple(map(put, pages, new))


def _attend(query: Array, layer: Array, table: Array, lengths: Array, *pages: Array, scale, value_dim) -> Array:
  return paged_attention(query, pages, layer, table, lengths, scale=scale, value_dim=value_dim)
