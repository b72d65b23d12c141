"""Rows to read and rows to decode, by hand."""

import numpy as np

from zeda_jax.rollout.inputs import decode_rows, make_rows, make_slots
from zeda_jax.rollout.requests import Request
from zeda_jax.rollout.scheduler import Scheduler


def scheduler_with(prompts, num_slots, shards, **options):
  scheduler = Scheduler(num_slots, 64 * shards, 4, [4, 8, 16, 32], 32 * shards, 4, shards)
  for id, prompt in enumerate(prompts):
    scheduler.add(id, Request(prompt, 6, **options), ())
  return scheduler


def test_prompts_lie_one_after_the_other_in_their_device_s_row():
  scheduler = scheduler_with([[1, 2, 3, 9], [4, 5, 9], [6, 9], [9]], 6, 2, zero_expert_bias=-np.inf)
  plan = scheduler.plan_prefill()
  (tokens, segments, table, bias), places = make_rows(plan, scheduler)
  assert tokens.shape == segments.shape == (2, plan.bucket) and table.shape == (6, 1) and bias.shape == (6,)
  assert len(plan.prompts) == 3  # the last one has nothing to read before it is decoded
  for prompt, (start, place) in zip(plan.prompts, places, strict=True):
    end = start + len(prompt.tokens)
    assert tokens[prompt.shard, start:end].tolist() == prompt.tokens
    assert (segments[prompt.shard, start:end] == 1 + place % 3).all() and place // 3 == prompt.shard
    assert table[place].tolist() == prompt.pages and bias[place] == -np.inf
  assert (segments > 0).sum() == 6 and not tokens[segments == 0].any()
  read = [place for _, place in places]
  assert all(table[i] == scheduler.pools[0].num_pages and bias[i] == 0 for i in range(6) if i not in read)


def test_few_responses_take_few_rows_of_each_device():
  scheduler = scheduler_with([[token] for token in range(40)], 128, 2)
  assert not scheduler.plan_prefill().prompts
  running = scheduler.running
  assert sum(r.slot < 64 for r in running) == 20
  for count, height in ((40, 64), (34, 64), (32, 16), (1, 16)):
    some = sorted(running, key=lambda r: r.slot % 64)[:count]
    num_rows, rows = decode_rows(some, scheduler)
    assert num_rows == 2 * height and len(set(rows)) == count
    assert all(row // height == r.slot // 64 for row, r in zip(rows, some, strict=True))
    slots = make_slots(some, rows, num_rows, scheduler, 1, 3)
    assert slots.tokens[rows].tolist() == [r.request.prompt[0] for r in some]
    assert np.count_nonzero(slots.remaining) == count and slots.table.shape == (num_rows, 3)
