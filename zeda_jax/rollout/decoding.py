"""The engine's work on the device: reading prompts into pages, and decode steps for all slots."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from zeda_jax.models import paged_cache
from zeda_jax.models.decoder import segment_positions
from zeda_jax.models.paged_cache import PagedCache, Pages, pages_sharding
from zeda_jax.models.params import Params, merge_model
from zeda_jax.rollout.sampling import RowSampling, sample_rows
from zeda_jax.sharding import Sharding


@struct.dataclass
class Slots:
  """What the decode steps need to know of each slot; an empty one has nothing remaining."""

  tokens: Int[Array, " B"]  # the last one that is known, which is not in the cache yet
  positions: Int[Array, " B"]  # of it
  remaining: Int[Array, " B"]  # tokens still to sample
  sampled: Int[Array, " B"]  # tokens sampled so far
  seeds: UInt32[Array, " B"]
  streams: UInt32[Array, " B"]
  sampling: RowSampling
  stop_ids: Int[Array, "B E"]  # -1 where there are fewer
  zero_expert_bias: Float[Array, " B"]
  table: Int[Array, "B W"]


@struct.dataclass
class Chunk:
  """What some decode steps gave; of each slot, the first `counts` steps mean something."""

  counts: Int[Array, " B"]
  tokens: Int[Array, "C B"]
  logprobs: Float[Array, "C B"]
  sampling_logprobs: Float[Array, "C B"]
  zero_picks: Int[Array, "C B"]
  zero_by_layer: Int[Array, " L"]
  steps: Int[Array, ""]
  picks: Int[Array, "C L B K"] | None


@struct.dataclass
class Reading:
  """What reading some prompts gave."""

  zero_picks: Int[Array, " R*S"]  # by prompt
  zero_by_layer: Int[Array, " L"]
  picks: Int[Array, "L R T K"] | None


@functools.partial(jax.jit, static_argnames=("graphdef", "with_picks"), donate_argnames="pages")
def prefill(
  graphdef: nnx.GraphDef,
  params: Params,
  pages: Pages,
  tokens: Int[Array, "R T"],
  segment_ids: Int[Array, "R T"],
  table: Int[Array, "R*S W"],
  zero_expert_bias: Float[Array, " R*S"],
  *,
  with_picks: bool,
) -> tuple[Pages, Reading]:
  """Writes prompts to their pages. Rows have up to S of them, one after the other: segments 1, 2, ..., then padding,
  which costs no expert work and writes nothing."""
  model = merge_model(graphdef, params)
  config, rows = model.config, tokens.shape[0]
  prompt = jnp.maximum(segment_ids, 1) - 1
  bias = jnp.take_along_axis(zero_expert_bias.reshape(rows, -1), prompt, axis=1).reshape(-1, 1)
  cache = PagedCache(pages, table, fresh=True, sharding=config.sharding)
  positions = segment_positions(segment_ids, tokens.shape)
  out = model.hidden(tokens, segment_ids, positions, bias, cache=cache)
  assert isinstance(out.cache, PagedCache)
  zero = ((out.picks >= config.num_experts) & (segment_ids > 0)[:, :, None]).sum(axis=-1)  # [L, R, T]
  mine = prompt[:, :, None] == jnp.arange(table.shape[0] // rows)  # [R, T, S]
  of_prompts = jnp.where(mine, zero.sum(axis=0)[:, :, None], 0).sum(axis=1).reshape(-1)
  picks = out.picks.astype(jnp.int16) if with_picks else None
  return _placed(out.cache.pages, Reading(of_prompts, zero.sum(axis=(1, 2)), picks), config.sharding)


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "with_picks"), donate_argnames="pages")
def decode(
  graphdef: nnx.GraphDef,
  params: Params,
  pages: Pages,
  slots: Slots,
  steps: Int[Array, ""],
  *,
  size: int,
  with_picks: bool,
) -> tuple[Pages, Chunk]:
  """`steps` tokens (at most `size`, C) for every slot, or fewer where a response ends: from then on it writes nothing
  and picks no expert. Ends early when all have ended."""
  model = merge_model(graphdef, params)
  config = model.config
  batch, layers = slots.tokens.shape[0], sum(config.moe_layers)
  fold = jax.vmap(jax.random.fold_in)
  keys = fold(jax.vmap(jax.random.key)(slots.seeds), slots.streams)

  def step(carry: tuple[Array, Array, Pages, Chunk]) -> tuple[Array, Array, Pages, Chunk]:
    live, last, pages, chunk = carry
    positions = slots.positions + chunk.counts
    cache = PagedCache(pages, slots.table, sharding=config.sharding)
    mask = live.astype(jnp.int32)[:, None]
    out = model.hidden(last[:, None], mask, positions[:, None], slots.zero_expert_bias[:, None], cache=cache)
    assert isinstance(out.cache, PagedCache)
    with jax.named_scope("sample"):
      logits = model.logits(out.hidden[:, 0])
      token, logprob, drawn = sample_rows(logits, fold(keys, slots.sampled + chunk.counts), slots.sampling)
    zero = ((out.picks[:, :, 0] >= config.num_experts) & live[:, None]).sum(axis=-1)  # [L, B]
    put = lambda all, new: all.at[chunk.steps].set(new.astype(all.dtype))
    chunk = Chunk(
      chunk.counts + live,
      put(chunk.tokens, token),
      put(chunk.logprobs, logprob),
      put(chunk.sampling_logprobs, drawn),
      put(chunk.zero_picks, zero.sum(axis=0)),
      chunk.zero_by_layer + zero.sum(axis=1),
      chunk.steps + 1,
      None if chunk.picks is None else put(chunk.picks, out.picks[:, :, 0]),
    )
    stopped = (token[:, None] == slots.stop_ids).any(axis=-1)
    return live & ~stopped & (chunk.counts < slots.remaining), token, out.cache.pages, chunk

  empty = lambda dtype: jnp.zeros((size, batch), dtype)
  start = Chunk(
    counts=jnp.zeros(batch, jnp.int32),
    tokens=empty(jnp.int32),
    logprobs=empty(jnp.float32),
    sampling_logprobs=empty(jnp.float32),
    zero_picks=empty(jnp.int32),
    zero_by_layer=jnp.zeros(layers, jnp.int32),
    steps=jnp.zeros((), jnp.int32),
    picks=jnp.zeros((size, layers, batch, config.num_experts_per_tok), jnp.int16) if with_picks else None,
  )
  goes_on = lambda carry: (carry[3].steps < steps) & carry[0].any()
  _, _, pages, chunk = jax.lax.while_loop(goes_on, step, (slots.remaining > 0, slots.tokens, pages, start))
  return _placed(pages, chunk, config.sharding)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="pages")
def copy_pages(pages: Pages, source: Int[Array, " C"], target: Int[Array, " C"], *, sharding: Sharding | None) -> Pages:
  return paged_cache.copy_pages(pages, source, target, sharding)


def _placed(pages: Pages, results: Any, sharding: Sharding | None) -> tuple[Pages, Any]:
  """Pages stay where they are, so that they can be donated again; what is read on the host is the same everywhere."""
  if sharding is None:
    return pages, results
  everywhere = NamedSharding(sharding.mesh, PartitionSpec())
  keep = jax.lax.with_sharding_constraint
  return keep(pages, pages_sharding(sharding)), keep(results, everywhere)
