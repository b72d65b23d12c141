"""What the host knows, as arrays for the functions of decoding.py."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from zeda_jax.rollout.decoding import Slots
from zeda_jax.rollout.pages import pages_for
from zeda_jax.rollout.sampling import RowSampling
from zeda_jax.rollout.scheduler import Plan, Response, Scheduler

Rows = tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R T"], Int[np.ndarray, "R*S W"], Float[np.ndarray, " R*S"]]


def make_rows(plan: Plan, scheduler: Scheduler) -> tuple[Rows, list[tuple[int, int]]]:
  """(tokens, segment ids, page table, zero-expert bias) of the prompts to read, one row for each device; and of each
  prompt, where in its row it begins and its place in the table."""
  shards, most, no_page = scheduler.num_shards, scheduler.slots_per_shard, scheduler.pools[0].num_pages
  tokens, segments = np.zeros((2, shards, plan.bucket), np.int32)
  table = np.full((shards * most, pages_for(plan.bucket, scheduler.page_size)), no_page, np.int32)
  bias = np.zeros(shards * most, np.float32)
  counts, ends, found = [0] * shards, [0] * shards, []
  for prompt in plan.prompts:
    shard = prompt.shard
    start, place = ends[shard], shard * most + counts[shard]
    ends[shard], counts[shard] = start + len(prompt.tokens), counts[shard] + 1
    tokens[shard, start : ends[shard]], segments[shard, start : ends[shard]] = prompt.tokens, counts[shard]
    table[place, : len(prompt.pages)], bias[place] = prompt.pages, prompt.request.zero_expert_bias
    found.append((start, place))
  return (tokens, segments, table, bias), found


def make_copies(plan: Plan, scheduler: Scheduler) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"]]:
  """Pages to copy and where to; a slot takes one at most."""
  height = scheduler.slots_per_shard
  source = np.zeros(scheduler.num_shards * height, np.int32)
  target = np.full(source.shape, scheduler.pools[0].num_pages, np.int32)
  for shard in range(scheduler.num_shards):
    for i, (_, *pair) in enumerate((c for c in plan.copies if c[0] == shard), start=shard * height):
      source[i], target[i] = pair
  return source, target


def make_slots(running: Sequence[Response], scheduler: Scheduler, num_stop_ids: int, width: int) -> Slots:
  """The state of all slots; `width` pages to a row of the table."""
  num_slots = len(scheduler.slots)

  def column(of: Callable[[Response], float], dtype: Any) -> Any:
    out = np.zeros(num_slots, dtype)
    for response in running:
      out[response.slot] = of(response)
    return out

  table: Any = np.full((num_slots, width), scheduler.pools[0].num_pages, np.int32)
  stop_ids: Any = np.full((num_slots, num_stop_ids), -1, np.int32)
  for response in running:
    table[response.slot, : len(response.pages)] = response.pages
    stop_ids[response.slot, : len(response.stop_ids)] = response.stop_ids
  of_request = lambda name, dtype: column(lambda r: getattr(r.request, name), dtype)
  return Slots(
    tokens=column(lambda r: r.tokens[-1] if r.tokens else r.request.prompt[-1], np.int32),
    positions=column(lambda r: r.num_cached, np.int32),
    remaining=column(lambda r: r.remaining, np.int32),
    sampled=column(lambda r: len(r.tokens), np.int32),
    seeds=of_request("seed", np.uint32),
    streams=column(lambda r: r.request.stream + r.index, np.uint32),
    sampling=RowSampling(
      of_request("temperature", np.float32),
      column(lambda r: min(r.request.top_k, 2**31 - 1), np.int32),
      of_request("top_p", np.float32),
      of_request("min_p", np.float32),
    ),
    stop_ids=stop_ids,
    zero_expert_bias=of_request("zero_expert_bias", np.float32),
    table=table,
  )
