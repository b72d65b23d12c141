"""Who gets a slot and pages of the cache, and when; on the host, without arrays, and the same in every process.

Requests are served in order of arrival. A response that starts gets a slot, pages for what is known of it and for the
next chunk, and is read into them (prefill). It grows page by page while it is decoded. Where pages run out, the
response that arrived last gives all of its pages back and waits again, to be read anew with what it has sampled so far;
the one that arrived first is never set back, so something always goes on.

The responses of one request share the pages that its prompt fills; the last page, which each of them goes on writing,
is copied. Those pages are a `Prefix` until all of the responses have started.

On a mesh, each device ("shard") has slots and pages of its own.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from zeda_jax.rollout.pages import PagePool, pages_for
from zeda_jax.rollout.requests import Request


@dataclasses.dataclass(eq=False)
class PromptReading:
  """What was measured while a prompt was read; shared by its responses."""

  zero_picks: int = 0
  picks: np.ndarray | None = None  # [P - 1, L, K]


@dataclasses.dataclass(eq=False)
class Response:
  """One response that waits or runs. Of its known tokens, all but the last are in the cache while it runs."""

  id: int
  index: int
  order: int
  request: Request
  stop_ids: tuple[int, ...]
  tokens: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
  zero_picks: int = 0
  picks: list[np.ndarray] = dataclasses.field(default_factory=list)
  reading: PromptReading | None = None  # set when it starts for the first time
  slot: int = -1
  pages: list[int] = dataclasses.field(default_factory=list)

  @property
  def known(self) -> list[int]:
    return [*self.request.prompt, *self.tokens]

  @property
  def num_cached(self) -> int:
    return len(self.request.prompt) + len(self.tokens) - 1

  @property
  def remaining(self) -> int:
    return self.request.max_new_tokens - len(self.tokens)

  def pages_after(self, steps: int, page_size: int) -> int:
    """Pages that it needs for so many decode steps more."""
    return pages_for(self.num_cached + min(steps, self.remaining), page_size)


@dataclasses.dataclass(eq=False)
class Prefix:
  """The pages of a prompt some of whose responses have yet to start."""

  pages: list[int]
  reading: PromptReading


@dataclasses.dataclass
class PromptToRead:
  shard: int
  tokens: list[int]
  pages: list[int]
  request: Request
  reading: PromptReading | None  # takes what is measured; None where it was before


@dataclasses.dataclass
class Plan:
  """Prompts to read, each device's packed into one row of `bucket` tokens, and then pages to copy."""

  bucket: int = 0
  prompts: list[PromptToRead] = dataclasses.field(default_factory=list)
  copies: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)  # (shard, source, target)
  used: list[Prefix] = dataclasses.field(default_factory=list)
  released: list[tuple[int, list[int]]] = dataclasses.field(default_factory=list)  # (shard, pages), once it is made


class Scheduler:
  """See the module.

  Args:
    num_slots: in all; a multiple of num_shards.
    num_pages: in all; a multiple of num_shards.
    page_size: tokens to a page.
    buckets: lengths to which rows of prompts are padded, ascending; the last one is for the longest prompt.
    prefill_tokens: about how many tokens are read at once, by all devices.
    chunk_steps: decode steps for which pages are made ready.
    num_shards: devices.
  """

  def __init__(
    self,
    num_slots: int,
    num_pages: int,
    page_size: int,
    buckets: Sequence[int],
    prefill_tokens: int,
    chunk_steps: int,
    num_shards: int = 1,
  ):
    self.page_size, self.buckets, self.chunk_steps = page_size, buckets, chunk_steps
    self.row_tokens = min(max(1, prefill_tokens // num_shards), buckets[-1])  # of a device's row, but for long prompts
    self.num_shards, self.slots_per_shard = num_shards, num_slots // num_shards
    self.slots: list[Response | None] = [None] * num_slots
    self.pools = [PagePool(num_pages // num_shards) for _ in range(num_shards)]
    self.waiting: list[Response] = []  # by order of arrival
    self.prefixes: dict[tuple[int, int], Prefix] = {}  # (request, shard) -> pages
    self.preemptions = 0
    self._not_started: dict[int, int] = {}  # request -> responses that have never run
    self._arrivals = 0

  @property
  def running(self) -> list[Response]:
    return [response for response in self.slots if response is not None]

  def add(self, id: int, request: Request, stop_ids: tuple[int, ...]) -> None:
    for index in range(request.n):
      self.waiting.append(Response(id, index, self._arrivals, request, stop_ids))
      self._arrivals += 1
    self._not_started[id] = request.n

  def cancel(self, id: int) -> bool:
    """Forgets a request; False where there is none."""
    mine = [response for response in (*self.running, *self.waiting) if response.id == id]
    for response in mine:
      self._vacate(response)
    self.waiting = [response for response in self.waiting if response.id != id]
    self._not_started.pop(id, None)
    self._drop_prefixes(id)
    return bool(mine)

  def finish(self, response: Response) -> None:
    self._vacate(response)

  def preempt_all(self) -> None:
    """Sets back everything that runs: nothing in the cache is used again."""
    for response in self.running:
      self._preempt(response)
    for id, _ in list(self.prefixes):
      self._drop_prefixes(id)

  # --- starting -----------------------------------------------------------------------------------------------------

  def plan_prefill(self) -> Plan:
    """Starts as many responses as there are slots, pages and room in the rows for, in order; one whose prompt finds no
    room in a row does not hold up shorter ones, and comes first in the next plan."""
    plan = Plan()
    for response in self.waiting[: 4 * len(self.slots)]:
      if not self._start(response, plan):
        break
    self.waiting = [response for response in self.waiting if response.slot < 0]
    for shard, pages in plan.released:
      self.pools[shard].release(pages)
    return plan

  def _start(self, response: Response, plan: Plan) -> bool:
    """Starts a response if it can; whether those behind it may be tried."""
    choices = [shard for shard in range(self.num_shards) if None in self._slots_of(shard)]
    if not choices:
      return False
    shared = lambda shard: response.reading is None and (response.id, shard) in self.prefixes
    choices.sort(key=lambda shard: (not shared(shard), -self.pools[shard].num_free))
    fits_plan = False
    for shard in choices:
      if not (shared(shard) or self._has_room(plan, shard, response.num_cached)):
        continue
      fits_plan = True
      if self._start_in(response, shard, plan):
        return True
    return not fits_plan

  def _has_room(self, plan: Plan, shard: int, length: int) -> bool:
    """Whether a device's row has room for so many tokens more."""
    planned = sum(len(prompt.tokens) for prompt in plan.prompts if prompt.shard == shard)
    return not plan.prompts or planned + length <= max(self.row_tokens, plan.bucket)

  def _slots_of(self, shard: int) -> list[Response | None]:
    return self.slots[shard * self.slots_per_shard : (shard + 1) * self.slots_per_shard]

  def _start_in(self, response: Response, shard: int, plan: Plan) -> bool:
    """Starts it with the pages of its request's prefix, with a new prefix, or with pages of its own."""
    length, pool = response.num_cached, self.pools[shard]
    is_fresh = response.reading is None
    siblings = self._not_started[response.id] if is_fresh else 0  # it is one of them
    prefix = self.prefixes.get((response.id, shard)) if is_fresh else None
    total = response.pages_after(self.chunk_steps, self.page_size)
    extra = total - length // self.page_size  # beside the pages that the prompt fills
    if prefix is not None:
      can_share = self._make_room(shard, total - len(prefix.pages) if siblings == 1 else extra, prefix, plan)
    else:
      can_share = siblings > 1 and length > 0 and self._make_room(shard, self._pages(length) + extra, None, plan)
      if can_share:
        prefix = self._new_prefix(response, shard, plan)
    if not can_share:
      if (prefix is not None or siblings > 1) and length and not self._may_start_alone(shard, response, plan):
        return False
      # Alone on a device, a response fits whatever it is, but there may be no page to spare for a copy.
      if prefix is not None:
        pool.release(self.prefixes.pop((response.id, shard)).pages)
        prefix = None
      if not self._make_room(shard, total, None, plan):
        return False
    if prefix is not None:
      self._share(response, shard, prefix, siblings == 1, plan)
    pages = pool.take(total - len(response.pages))
    assert pages is not None
    response.pages = response.pages + pages
    if prefix is None:
      response.reading = response.reading or PromptReading()
      self._read(response, shard, response.pages, response.reading if is_fresh else None, plan)
    response.slot = shard * self.slots_per_shard + self._slots_of(shard).index(None)
    self.slots[response.slot] = response
    if is_fresh:
      self._count_start(response, plan)
    return True

  def _may_start_alone(self, shard: int, response: Response, plan: Plan) -> bool:
    return not any(self._slots_of(shard)) and self._has_room(plan, shard, response.num_cached)

  def _new_prefix(self, response: Response, shard: int, plan: Plan) -> Prefix:
    pages = self.pools[shard].take(self._pages(response.num_cached))
    assert pages is not None
    prefix = self.prefixes[response.id, shard] = Prefix(pages, PromptReading())
    self._read(response, shard, pages, prefix.reading, plan)
    return prefix

  def _share(self, response: Response, shard: int, prefix: Prefix, is_last: bool, plan: Plan) -> None:
    plan.used.append(prefix)
    response.reading = prefix.reading
    if is_last:
      response.pages = prefix.pages
      del self.prefixes[response.id, shard]
      return
    pool, full = self.pools[shard], response.num_cached // self.page_size
    response.pages = pool.share(prefix.pages[:full])
    for source in prefix.pages[full:]:  # at most one
      copy = pool.take(1)
      assert copy is not None
      response.pages = response.pages + copy
      plan.copies.append((shard, source, copy[0]))

  def _read(self, response: Response, shard: int, pages: list[int], reading: PromptReading | None, plan: Plan) -> None:
    length = response.num_cached
    if length:
      tokens = response.known[:length]
      plan.prompts.append(PromptToRead(shard, tokens, pages[: self._pages(length)], response.request, reading))
      planned = sum(len(prompt.tokens) for prompt in plan.prompts if prompt.shard == shard)
      plan.bucket = max(plan.bucket, next(bucket for bucket in self.buckets if bucket >= planned))

  def _count_start(self, response: Response, plan: Plan) -> None:
    self._not_started[response.id] -= 1
    if self._not_started[response.id] == 0:
      del self._not_started[response.id]
      self._drop_prefixes(response.id, plan)

  # --- growing ------------------------------------------------------------------------------------------------------

  def plan_decode(self, steps: int) -> list[Response]:
    """Makes pages ready for so many steps, and sets back what there are none for; gives what runs."""
    for response in sorted(self.running, key=lambda r: r.order):
      shard = response.slot // self.slots_per_shard
      while response.slot >= 0:
        missing = response.pages_after(steps, self.page_size) - len(response.pages)
        pages = self.pools[shard].take(max(missing, 0))
        if pages is not None:
          response.pages = response.pages + pages
          break
        if not self._drop_idle_prefix(shard):
          self._preempt(max((r for r in self._slots_of(shard) if r is not None), key=lambda r: r.order))
    return self.running

  # --- making room --------------------------------------------------------------------------------------------------

  def _pages(self, tokens: int) -> int:
    return pages_for(tokens, self.page_size)

  def _make_room(self, shard: int, count: int, keep: Prefix | None, plan: Plan) -> bool:
    """Whether `count` pages are free beside what the running need for the next chunk; idle prefixes may go for them."""
    for response in self._slots_of(shard):
      if response is not None:
        count += max(0, response.pages_after(self.chunk_steps, self.page_size) - len(response.pages))
    while self.pools[shard].num_free < count:
      if not self._drop_idle_prefix(shard, keep, plan):
        return False
    return True

  def _drop_idle_prefix(self, shard: int, keep: Prefix | None = None, plan: Plan | None = None) -> bool:
    """Gives up a prompt whose other responses will read it again; not one that this plan copies from."""
    for (id, of), prefix in reversed(self.prefixes.items()):
      if of == shard and prefix is not keep and not (plan and any(prefix is p for p in plan.used)):
        del self.prefixes[id, of]
        self.pools[shard].release(prefix.pages)
        return True
    return False

  def _drop_prefixes(self, id: int, plan: Plan | None = None) -> None:
    for shard in range(self.num_shards):
      prefix = self.prefixes.pop((id, shard), None)
      if prefix is not None and plan is not None:  # something may be copied from it: nobody may write there yet
        plan.released.append((shard, prefix.pages))
      elif prefix is not None:
        self.pools[shard].release(prefix.pages)

  def _preempt(self, response: Response) -> None:
    self._vacate(response)
    bisect.insort(self.waiting, response, key=lambda r: r.order)
    self.preemptions += 1

  def _vacate(self, response: Response) -> None:
    if response.slot >= 0:
      self.pools[response.slot // self.slots_per_shard].release(response.pages)
      self.slots[response.slot] = None
      response.slot, response.pages = -1, []
