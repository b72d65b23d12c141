"""The rollout engine: continuous batching over slots, a paged cache, prefill in buckets, decode in chunks of steps.

    engine = Engine(model, num_slots=32)
    for place, completion in engine.run([Request(prompt, max_new_tokens=256) for prompt in prompts]):
      ...

or, as a server does it, from one thread:

    id = engine.add(request)            # at any time
    for update in engine.step(): ...    # one prefill bucket or one chunk of decode steps
    engine.cancel(id)

A prompt is read up to its last token; that one is the first input of decoding. So a prompt that several responses share
and a response that goes on after it was set back start in the same way as any other (see rollout/scheduler.py).

With `model.config.sharding`, slots and pages are shared out over all devices of the mesh, and the parameters are spread
as decoding wants them (`Sharding.for_generation`). Each of several processes makes the same calls in the same order:
what the host decides depends on nothing else.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from zeda_jax.distributed import to_host
from zeda_jax.errors import ZedaError
from zeda_jax.models.decoder import Decoder
from zeda_jax.models.paged_cache import Pages, init_pages, page_bytes, pages_sharding
from zeda_jax.models.params import Params, moved, resharded, split_model, unstacked
from zeda_jax.rollout.decoding import Chunk, Reading, copy_pages, decode, prefill
from zeda_jax.rollout.inputs import make_copies, make_rows, make_slots
from zeda_jax.rollout.pages import pages_for
from zeda_jax.rollout.requests import Completion, Request, Update, check_fits
from zeda_jax.rollout.scheduler import Plan, Response, Scheduler
from zeda_jax.rollout.statistics import Statistics

_SMALLEST_BUCKET = 16
_DEFAULT_LENGTH = 2048  # tokens per slot for which the cache has room, unless it is said


class Engine:
  """Generates for many requests at once.

  Args:
    model: static or dynamic decoder; its parameters are used, not copied, but for those that a mesh wants elsewhere.
    num_slots: responses decoded together; on a mesh, a multiple of its devices.
    max_tokens: how many tokens the cache holds, of all responses together. None: 2048 a slot, or max_length if that
      is less. Requests wait, and running responses are set back, where it is full.
    max_length: tokens of one sequence, prompt and response; None means the model's context.
    page_size: tokens to a page of the cache.
    chunk_steps: decode steps between two looks at the results: more cost less time on the host, and make a finished
      response's slot wait longer for the next one.
    prefill_tokens: about how many tokens are read at once, of prompts that are packed into one row for each device; a
      longer prompt is read alone.
    smallest_bucket: rows are padded to at least so many tokens, rounded up to a power of two; each further power up to
      the longest compiles a program of its own.
    unstack_layers: keep another copy of the parameters, by layer (see `unstacked`): decoding is faster for it, and
      compiling takes longer with many layers. None: on a CPU.

  Raises:
    ZedaError: a size is not positive, or the slots cannot be shared out over the mesh.
  """

  def __init__(
    self,
    model: Decoder,
    *,
    num_slots: int = 16,
    max_tokens: int | None = None,
    max_length: int | None = None,
    page_size: int = 64,
    chunk_steps: int = 16,
    prefill_tokens: int = 2048,
    smallest_bucket: int = 16,
    unstack_layers: bool | None = None,
  ):
    if model.config.sharding is not None:
      model = resharded(model, model.config.sharding.for_generation(model.config.num_experts))
    self.config = config = model.config
    self.max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
    max_tokens = num_slots * min(self.max_length, _DEFAULT_LENGTH) if max_tokens is None else max_tokens
    sizes = {"num_slots": num_slots, "page_size": page_size, "chunk_steps": chunk_steps}
    sizes |= {"smallest_bucket": smallest_bucket}
    for name, size in (sizes | {"max_tokens": max_tokens, "prefill_tokens": prefill_tokens}).items():
      if size < 1:
        raise ZedaError(f"{name} is {size}; expected at least 1.")
    shards = 1 if config.sharding is None else config.sharding.num_devices
    if num_slots % shards:
      raise ZedaError(
        f"num_slots is {num_slots}, which cannot be shared out over the {shards} devices of the mesh: make it a "
        f"multiple of {shards}."
      )
    num_pages = pages_for(pages_for(max_tokens, page_size), shards) * shards
    buckets = [max(_SMALLEST_BUCKET, 1 << (smallest_bucket - 1).bit_length())]
    while buckets[-1] < max(self.max_length, prefill_tokens // shards):
      buckets.append(2 * buckets[-1])
    self._scheduler = Scheduler(num_slots, num_pages, page_size, buckets, prefill_tokens, chunk_steps, shards)
    if unstack_layers is None:
      unstack_layers = config.sharding is None and jax.default_backend() == "cpu"
    self._unstack = unstack_layers
    self._stacked_graphdef, params = split_model(model)
    # What `update` expects: shape, type and place of each parameter.
    self._expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    self._params: Params | None
    self._graphdef, self._params = self._as_decoded(params)
    # One program, compiled once, and pages that lie from the start where the other programs leave them.
    where = pages_sharding(config.sharding) or jax.tree.leaves(params)[0].sharding
    self._empty_pages = jax.jit(functools.partial(init_pages, config, num_pages, page_size), out_shardings=where)
    self._pages: Pages | None = self._empty_pages()
    self._width = pages_for(self.max_length, page_size)
    self._num_stop_ids = 4
    self._next_id = 0
    self._statistics = Statistics(
      num_slots, num_pages, config.num_experts_per_tok, np.zeros(sum(config.moe_layers), np.int64)
    )

  # --- requests -----------------------------------------------------------------------------------------------------

  def add(self, request: Request) -> int:
    """Queues a request; its number.

    Raises:
      ZedaError: the model or the cache cannot take it.
    """
    check_fits(request, self.config.vocab_size, self.max_length)
    scheduler = self._scheduler
    tokens = len(request.prompt) + request.max_new_tokens - 1
    room = scheduler.pools[0].num_pages * scheduler.page_size
    if tokens > room:
      raise ZedaError(
        f"A prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones need {tokens} places in the "
        f"cache, which has {room} for one sequence: raise max_tokens or ask for fewer tokens."
      )
    stop_ids = self.config.eos_token_ids if request.stop_ids is None else request.stop_ids
    while len(stop_ids) > self._num_stop_ids:
      self._num_stop_ids *= 2
    self._next_id += 1
    scheduler.add(self._next_id - 1, request, tuple(int(token) for token in stop_ids))
    return self._next_id - 1

  def cancel(self, id: int) -> bool:
    """Ends a request at once and frees what it holds; False if it is not known or complete."""
    return self._scheduler.cancel(id)

  @property
  def is_idle(self) -> bool:
    return not self._scheduler.waiting and not self._scheduler.running

  @property
  def page_bytes(self) -> int:
    """Memory of one page of the cache."""
    return page_bytes(self.config, self._scheduler.page_size)

  def statistics(self) -> Statistics:
    scheduler = self._scheduler
    free = sum(pool.num_free for pool in scheduler.pools)
    return dataclasses.replace(
      self._statistics,
      zero_by_layer=self._statistics.zero_by_layer.copy(),
      queue=len(scheduler.waiting),
      running=len(scheduler.running),
      pages_used=self._statistics.num_pages - free,
      preemptions=scheduler.preemptions,
    )

  def update(self, params: Params) -> None:
    """Takes other parameters of the same model, without compiling anything or (unless layers are unstacked) copying
    what lies where it should.

    Requests go on: what they sampled stays, and their caches are made anew with the new parameters. The arrays must
    live as long as the engine uses them: one that a training step donates must be followed by another update.

    Args:
      params: as `split_model` gives them.

    Raises:
      ZedaError: a parameter is missing, or has another shape or type.
    """
    _check_same(self._expected, params)
    self._scheduler.preempt_all()
    places = jax.tree.map(lambda x: x.sharding, self._expected)
    self._graphdef, self._params = self._as_decoded(moved(params, places))
    if self._pages is None:
      self._pages = self._empty_pages()

  def release(self) -> None:
    """Frees the memory of cache and parameters until the next `update`; requests wait meanwhile, as then."""
    self._scheduler.preempt_all()
    self._params = self._pages = None

  def _as_decoded(self, params: Params) -> tuple[nnx.GraphDef, Params]:
    """Structure and parameters in the form that the device's programs take."""
    return unstacked(self._stacked_graphdef, params) if self._unstack else (self._stacked_graphdef, params)

  # --- work ---------------------------------------------------------------------------------------------------------

  def step(self) -> list[Update]:
    """Reads one bucket of prompts, or else decodes one chunk of steps; does nothing if there is nothing to do.

    Raises:
      ZedaError: its memory was released.
    """
    if self._params is None:
      raise ZedaError("The engine's memory was released: call update with the parameters to go on with.")
    plan = self._scheduler.plan_prefill()
    start = time.perf_counter()
    if plan.prompts:
      self._read(plan)
    if plan.copies:
      self._pages = copy_pages(self._pages, *make_copies(plan, self._scheduler), sharding=self.config.sharding)
    if plan.prompts:
      self._statistics.prefill_seconds += time.perf_counter() - start
      return []
    running = self._scheduler.plan_decode(self._scheduler.chunk_steps)
    if not running:
      return []
    updates = self._take(running, self._decode(running))
    self._statistics.decode_seconds += time.perf_counter() - start
    return updates

  def run(
    self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
  ) -> Iterator[tuple[int, Completion]]:
    """(place in `requests`, response) for all responses, as they are completed. Other requests are served beside, but
    what they get is dropped.

    Args:
      requests: all are checked and queued before the first is answered.
      progress: called with (responses completed, responses in all) after each step, whether it completed any or not;
        what it raises ends the work. Ending it early, by that or by leaving the loop, cancels what is left.
    """
    places = {self.add(request): place for place, request in enumerate(requests)}
    done, total = 0, sum(request.n for request in requests)
    try:
      while done < total:
        found = [u for u in self.step() if u.completion is not None and u.id in places]
        done += len(found)
        if progress is not None:
          progress(done, total)
        for update in found:
          assert update.completion is not None
          yield places[update.id], update.completion
    finally:
      for id in places:
        self.cancel(id)

  # --- on the device ------------------------------------------------------------------------------------------------

  def _read(self, plan: Plan) -> None:
    rows, places = make_rows(plan, self._scheduler)
    with_picks = any(prompt.reading is not None and prompt.request.record_picks for prompt in plan.prompts)
    with self._on_mesh():
      self._pages, device_reading = prefill(self._graphdef, self._params, self._pages, *rows, with_picks=with_picks)
    reading: Reading = to_host(device_reading)
    for prompt, (start, place) in zip(plan.prompts, places, strict=True):
      if prompt.reading is not None:
        prompt.reading.zero_picks = int(reading.zero_picks[place])
        if prompt.request.record_picks:
          assert reading.picks is not None
          mine = reading.picks[:, prompt.shard, start : start + len(prompt.tokens)]
          prompt.reading.picks = np.asarray(mine).swapaxes(0, 1)
    self._statistics.zero_by_layer += np.asarray(reading.zero_by_layer)
    self._statistics.prompt_tokens += sum(len(prompt.tokens) for prompt in plan.prompts)

  def _decode(self, running: Sequence[Response]) -> Chunk:
    scheduler = self._scheduler
    slots = make_slots(running, scheduler, self._num_stop_ids, self._width)
    options = {"size": scheduler.chunk_steps, "with_picks": any(r.request.record_picks for r in running)}
    with self._on_mesh():
      steps = np.int32(scheduler.chunk_steps)
      self._pages, chunk = decode(self._graphdef, self._params, self._pages, slots, steps, **options)
    return to_host(chunk)

  def _on_mesh(self) -> jax.sharding.set_mesh | contextlib.nullcontext:
    sharding = self.config.sharding
    return contextlib.nullcontext() if sharding is None else jax.set_mesh(sharding.mesh)

  def _take(self, running: Sequence[Response], chunk: Chunk) -> list[Update]:
    """Adds what a chunk gave to its responses; those that have ended leave their slots."""
    updates = []
    for response in running:
      slot, count = response.slot, int(chunk.counts[response.slot])
      tokens, logprobs = chunk.tokens[:count, slot].tolist(), chunk.logprobs[:count, slot].tolist()
      response.tokens += tokens
      response.logprobs += logprobs
      response.sampling_logprobs += chunk.sampling_logprobs[:count, slot].tolist()
      response.zero_picks += int(chunk.zero_picks[:count, slot].sum())
      if response.request.record_picks:
        assert chunk.picks is not None
        response.picks.append(np.asarray(chunk.picks[:count, :, slot]))
      has_ended = response.remaining == 0 or response.tokens[-1] in response.stop_ids
      completion = self._completion(response) if has_ended else None
      if has_ended:
        self._scheduler.finish(response)
      updates.append(Update(response.id, response.index, tokens, logprobs, completion))
    counts = int(np.sum(chunk.counts))
    self._statistics.new_tokens += counts
    self._statistics.slot_steps += int(chunk.steps) * len(self._scheduler.slots)
    self._statistics.zero_by_layer += np.asarray(chunk.zero_by_layer)
    return updates

  def _completion(self, response: Response) -> Completion:
    reading = response.reading
    assert reading is not None
    picks_per_token = sum(self.config.moe_layers) * self.config.num_experts_per_tok
    passes, before = len(response.tokens), len(response.request.prompt) - 1
    parts = response.picks if reading.picks is None else [reading.picks, *response.picks]
    return Completion(
      id=response.id,
      index=response.index,
      tokens=response.tokens,
      logprobs=response.logprobs,
      sampling_logprobs=response.sampling_logprobs,
      zero_ratio=response.zero_picks / (passes * picks_per_token),
      zero_ratio_all=(reading.zero_picks + response.zero_picks) / ((before + passes) * picks_per_token),
      finish_reason="stop" if response.tokens[-1] in response.stop_ids else "length",
      picks=np.concatenate(parts) if response.request.record_picks else None,
    )


def _check_same(old: Params, new: Params) -> None:
  flat_old, flat_new = (dict(jax.tree_util.tree_leaves_with_path(params)) for params in (old, new))
  for path in flat_old.keys() | flat_new.keys():
    shapes = [_kind(flat.get(path)) for flat in (flat_old, flat_new)]
    if shapes[0] != shapes[1]:
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      raise ZedaError(f"update: parameter {name} is {shapes[1]}; expected {shapes[0]}, as the engine's model has it.")


def _kind(leaf: jax.Array | jax.ShapeDtypeStruct | None) -> str:
  return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
