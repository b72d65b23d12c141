"""Slots and pages under random requests, endings, cancellations and set-backs, against a cache made of lists."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from zeda_jax.rollout.pages import PagePool
from zeda_jax.rollout.requests import Request
from zeda_jax.rollout.scheduler import Scheduler

BUCKETS = [4, 8, 16, 32]


def test_pages_are_taken_shared_and_given_back():
  pool = PagePool(4)
  mine = pool.take(3)
  assert pool.take(2) is None and pool.num_free == 1
  shared = pool.share(mine[:2])
  pool.release(mine)
  assert pool.num_free == 2 and [pool.references(page) for page in mine] == [1, 1, 0]
  pool.release(shared)
  assert sorted(pool.take(4)) == [0, 1, 2, 3]
  with pytest.raises(AssertionError):
    PagePool(2).release([0])


def check_pages(scheduler):
  """Every page is free, or referred to exactly as often as the pool counts; what is written to has one owner."""
  for shard, pool in enumerate(scheduler.pools):
    mine = [r for r in scheduler.running if r.slot // scheduler.slots_per_shard == shard]
    owners = [r.pages for r in mine] + [p.pages for (_, of), p in scheduler.prefixes.items() if of == shard]
    counts = np.bincount([page for pages in owners for page in pages], minlength=pool.num_pages)
    assert [pool.references(page) for page in range(pool.num_pages)] == counts.tolist()
    assert pool.num_free == (counts == 0).sum()
    for r in mine:
      assert len(set(r.pages)) == len(r.pages)
      assert all(counts[page] == 1 for page in r.pages[r.num_cached // scheduler.page_size :])
  slots = [r.slot for r in scheduler.running]
  assert slots == [i for i, r in enumerate(scheduler.slots) if r is not None]
  assert all(r.slot == -1 and not r.pages for r in scheduler.waiting)
  assert [r.order for r in scheduler.waiting] == sorted(r.order for r in scheduler.waiting)


class FakeDevice:
  """A cache of Python lists: what lies in it is checked before every step, and tokens follow from what lies in it."""

  def __init__(self, scheduler):
    self.scheduler = scheduler
    shape = scheduler.num_shards, scheduler.pools[0].num_pages, scheduler.page_size
    self.cache = np.full(shape, -1)
    self.done = []

  def step(self):
    scheduler, size = self.scheduler, self.scheduler.page_size
    plan = scheduler.plan_prefill()
    check_pages(scheduler)
    for shard in range(scheduler.num_shards):
      read = [prompt for prompt in plan.prompts if prompt.shard == shard]
      assert len(read) <= scheduler.slots_per_shard
      assert sum(len(prompt.tokens) for prompt in read) <= plan.bucket
      assert sum(copy[0] == shard for copy in plan.copies) <= scheduler.slots_per_shard
    written = [(prompt.shard, page) for prompt in plan.prompts for page in prompt.pages]
    assert len(set(written)) == len(written)
    longest = max((len(prompt.tokens) for prompt in plan.prompts), default=0)
    limit = max(scheduler.row_tokens, longest)
    assert plan.bucket in (0, *BUCKETS) and plan.bucket <= next(b for b in BUCKETS if b >= limit)
    for prompt in plan.prompts:
      for place, token in enumerate(prompt.tokens):
        self.cache[prompt.shard, prompt.pages[place // size], place % size] = token
    for shard, source, target in plan.copies:
      self.cache[shard, target] = self.cache[shard, source]
    if plan.prompts:
      return
    running = scheduler.plan_decode(scheduler.chunk_steps)
    check_pages(scheduler)
    for r in running:
      shard = r.slot // scheduler.slots_per_shard
      for _ in range(scheduler.chunk_steps):
        place, token = r.num_cached, r.known[-1]
        self.cache[shard, r.pages[place // size], place % size] = token
        lies = [int(self.cache[shard, r.pages[p // size], p % size]) for p in range(place + 1)]
        assert lies == r.known
        r.tokens.append((sum(lies) + r.index) % 97)
        if r.tokens[-1] in r.stop_ids or not r.remaining:
          scheduler.finish(r)
          self.done.append(r)
          break


SIZES = st.tuples(st.integers(1, 4), st.integers(9, 16), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(4, 64))


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
@hypothesis.given(sizes=SIZES, seed=st.integers(0, 2**20), longest=st.integers(1, 24), eager=st.integers(1, 6))
def test_nothing_is_lost_overwritten_or_stuck(sizes, seed, longest, eager):
  slots, pages, shards, chunk_steps, prefill_tokens = sizes
  scheduler = Scheduler(slots * shards, pages * shards, 4, BUCKETS, prefill_tokens, chunk_steps, shards)
  device, rng = FakeDevice(scheduler), np.random.default_rng(seed)
  wanted = {}
  for id in range(30):
    length, new, n = rng.integers(1, (longest + 1, 13, 6)).tolist()
    wanted[id] = Request(rng.integers(0, 97, length).tolist(), new, n=n)
    scheduler.add(id, wanted[id], (5, 6))
    for _ in range(rng.integers(0, eager + 1)):
      device.step()
    check_pages(scheduler)
    dice = rng.random()
    if dice < 0.2:
      chosen = int(rng.integers(0, id + 1))
      is_known = any(r.id == chosen for r in (*scheduler.running, *scheduler.waiting))
      assert scheduler.cancel(chosen) == is_known
      if is_known:
        del wanted[chosen]
    elif dice < 0.25:
      scheduler.preempt_all()
    check_pages(scheduler)
  for _ in range(2000):
    if not scheduler.waiting and not scheduler.running:
      break
    device.step()
  assert not scheduler.waiting and not scheduler.running
  assert all(pool.num_free == pages for pool in scheduler.pools) and not scheduler.prefixes
  finished = {(r.id, r.index) for r in device.done}
  for id, request in wanted.items():
    assert all((id, index) in finished for index in range(request.n))


def test_a_full_cache_sets_the_latest_back_and_shares_prompts():
  # Two long responses fit, three do not; the prompts of four responses are read once while they fit.
  scheduler = Scheduler(4, 12, 4, BUCKETS, 64, 4)
  device = FakeDevice(scheduler)
  scheduler.add(0, Request([1] * 9, 12, n=4), ())
  plan = scheduler.plan_prefill()
  assert len(plan.prompts) == 1 and len(scheduler.running) == 4
  assert not plan.copies  # 8 tokens: two whole pages
  assert sum(pool.num_free for pool in scheduler.pools) == 12 - 2 - 4
  scheduler.preempt_all()
  while scheduler.waiting or scheduler.running:
    device.step()
  assert scheduler.preemptions > 4
  assert sorted(r.index for r in device.done) == [0, 1, 2, 3]
  assert device.done[0].index == 0


def test_prompts_are_packed_in_order_and_what_finds_no_room_comes_first_in_the_next_row():
  scheduler = Scheduler(4, 40, 4, BUCKETS, 16, 4)
  for id, length in enumerate((9, 10, 7, 3, 30, 2)):
    scheduler.add(id, Request([1] * length, 4), ())
  lengths = lambda plan: [len(prompt.tokens) for prompt in plan.prompts]
  plan = scheduler.plan_prefill()
  assert plan.bucket == 16 and lengths(plan) == [8, 6, 2]  # 9 tokens more have no room beside the first 8
  assert [r.id for r in scheduler.waiting] == [1, 4, 5]
  plan = scheduler.plan_prefill()
  assert plan.bucket == 16 and lengths(plan) == [9]  # and then there is no slot
  scheduler.finish(scheduler.slots[0])
  scheduler.finish(scheduler.slots[1])
  plan = scheduler.plan_prefill()
  assert plan.bucket == 32 and lengths(plan) == [29, 1]  # a long one; its padding has room for others
