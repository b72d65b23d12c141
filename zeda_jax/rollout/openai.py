"""The rollout stage with another engine: a server of OpenAI's API, such as vLLM or SGLang, answers every prompt.

The same shards and records as `stage.sample_rollouts`. Requests go on over the ends of shards, so the server's batch
stays full; a shard is written when its last answer is there. A stopped run asks again for unfinished shards.
"""

import asyncio
import concurrent.futures
import pathlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from zeda_jax.data.jsonl import JsonLines
from zeda_jax.data.prompts import Prompts
from zeda_jax.data.rollouts import finished_shards, make_record, shard_name, shard_range, write_shard
from zeda_jax.distributed.agreement import from_primary
from zeda_jax.errors import ZedaError
from zeda_jax.rollout.openai_answers import Answer, Unverified, Verifier
from zeda_jax.rollout.openai_client import Client, base_url, read_key
from zeda_jax.rollout.openai_server import Server, check_server
from zeda_jax.rollout.stage import Progress, num_shards

T = TypeVar("T")

_BEAT = 0.5  # seconds after which progress is reported, and signals are looked at, when no answer came


def request_seed(seed: int, index: int) -> int:
  """The seed of a prompt's request, from the recipe's and the prompt's number; 31 bits, which every server takes."""
  return int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> 1)


def sample_from_server(
  verifier: Verifier,
  prompts: Prompts,
  indices: Sequence[int],
  render: Callable[[int], list[int]],
  longest: int,
  directory: pathlib.Path,
  settings: Any,
  seed: int,
  progress: Progress = lambda *_: None,
  tell: Callable[[str], None] = lambda line: None,
) -> None:
  """Writes one response per prompt to rollouts-*.jsonl, going on after the shards that exist.

  Answers whose token ids cannot be verified are left out. Where there are several processes, all must call this with
  the same arguments; the primary one asks the server and writes.

  Args:
    verifier: the teacher's tokenizer, vocabulary and EOS tokens.
    prompts, indices, render, directory, seed: see `stage.sample_rollouts`.
    longest: tokens of the longest prompt.
    settings: the recipe's `rollout` section.
    progress: called after answers and at least every second; may raise to stop, which drops unfinished shards.
    tell: shows a line, on the primary process.

  Raises:
    ZedaError: the server does not fit, fails for good, or more than `settings.max_dropped` of all answers cannot be
      verified; the shards written so far stay.
  """
  work: list[_Work] = []  # of the primary process alone

  def start() -> None:
    work.append(_Work(verifier, prompts, indices, render, directory, settings, seed, tell))
    work[0].connect(longest)

  try:
    from_primary(start)
    over = False
    while not over:
      answered, over = from_primary(lambda: work[0].step(_BEAT))
      progress(answered, len(indices))
  finally:
    for each in work:
      each.close()


class _Work:
  """The requests that are under way, and the answers of shards that are not complete."""

  def __init__(
    self,
    verifier: Verifier,
    prompts: Prompts,
    indices: Sequence[int],
    render: Callable[[int], list[int]],
    directory: pathlib.Path,
    settings: Any,
    seed: int,
    tell: Callable[[str], None],
  ):
    self._verifier, self._prompts, self._indices, self._render = verifier, prompts, indices, render
    self._directory, self._settings, self._seed, self._tell = directory, settings, seed, tell
    self._shards = num_shards(len(indices), settings.shard_size)
    self._dropped, self._reason = 0, ""
    self.answered = 0
    done = set(finished_shards(directory, self._shards))
    for shard in done:
      numbers = self._numbers(shard)
      self.answered += len(numbers)
      self._dropped += len(numbers) - len(JsonLines(directory / shard_name(shard, self._shards)))
    self._open: dict[int, dict[int, dict[str, Any] | None]] = {}  # shard -> prompt number -> record, None if dropped
    self._waiting = ((s, i) for s in range(self._shards) if s not in done for i in self._numbers(s))
    self._pending: dict[concurrent.futures.Future[Answer | Unverified], tuple[int, int, list[int]]] = {}
    key = read_key(settings.key_variable)
    self._client = Client(base_url(settings.url), key, float(settings.timeout), settings.retries)
    self._loop = _Loop()
    self._server: Server | None = None
    self._check: concurrent.futures.Future[tuple[Server, str]] | None = None

  def connect(self, longest: int) -> None:
    """Begins to check the server; `step` goes on once that is done."""
    settings = self._settings
    self._check = self._loop.start(check_server(self._client, self._verifier, settings, settings.model, longest))

  def step(self, seconds: float) -> tuple[int, bool]:
    """Waits that long for answers, writes the shards that they complete; (prompts answered, whether all are)."""
    if self._server is None:
      assert self._check is not None
      if not concurrent.futures.wait([self._check], seconds).done:
        return self.answered, False
      self._server, line = self._check.result()
      self._tell(line)
    self._ask()
    ready, _ = concurrent.futures.wait(self._pending, seconds, concurrent.futures.FIRST_COMPLETED)
    for future in ready:
      self._take(future)
    self._ask()  # before writing, so that the server does not wait for the disk
    for shard in [s for s, records in self._open.items() if len(records) == len(self._numbers(s))]:
      self._write(shard)
    over = not self._pending and not self._open
    if over and self._dropped:
      self._tell(self._summary())
    return self.answered, over

  def _summary(self) -> str:
    return f"{self._dropped} of {len(self._indices)} answers were left out: their token ids could not be verified" + (
      f" ({self._reason})" if self._reason else ""
    )

  def close(self) -> None:
    """Ends all requests; the server sees their connections close, and stops working on them."""
    for future in self._pending:
      future.cancel()
    self._loop.close(self._client.close())

  def _numbers(self, shard: int) -> Sequence[int]:
    return [int(self._indices[i]) for i in shard_range(shard, self._shards, len(self._indices))]

  def _ask(self) -> None:
    """Keeps `concurrency` requests under way."""
    assert self._server is not None
    while len(self._pending) < self._settings.concurrency:
      shard, index = next(self._waiting, (-1, -1))
      if shard < 0:
        return
      self._open.setdefault(shard, {})
      prompt = self._render(index)
      future = self._loop.start(self._server.answer(prompt, request_seed(self._seed, index)))
      self._pending[future] = (shard, index, prompt)

  def _take(self, future: concurrent.futures.Future[Answer | Unverified]) -> None:
    shard, index, prompt = self._pending.pop(future)
    try:
      answer = future.result()
    except ZedaError as error:
      raise ZedaError(f"{self._prompts.location(index)}: {error}") from error
    record = None
    if isinstance(answer, Unverified):
      self._drop(index, answer)
    else:
      prompt_record = self._prompts[index]
      record = make_record(prompt_record, index, prompt, answer.tokens, answer.logprobs, finished=answer.finished)
    self._open[shard][index] = record
    self.answered += 1

  def _drop(self, index: int, reason: Unverified) -> None:
    self._dropped, self._reason = self._dropped + 1, f"{self._prompts.location(index)}: {reason}"
    share, total = self._settings.max_dropped, len(self._indices)
    if self._dropped > share * total:
      raise ZedaError(
        f"{self._client.url}: the token ids of {self._dropped} answers could not be verified, more than "
        f"config.rollout.max_dropped={share:g} of {total}; the last one, {self._reason}. Use a server that gives token "
        "ids, such as vLLM, SGLang and zeda serve, or allow more."
      )

  def _write(self, shard: int) -> None:
    records = self._open.pop(shard)
    kept: Iterator[dict[str, Any]] = (r for i in self._numbers(shard) if (r := records[i]) is not None)
    if not any(records.values()):
      raise ZedaError(
        f"{self._client.url}: no answer to the {len(records)} prompts of one file could be verified; the last one, "
        f"{self._reason}. Raise config.rollout.shard_size."
      )
    write_shard(self._directory, shard, self._shards, kept)


class _Loop:
  """An event loop in a thread of its own: requests go on while the caller waits, writes, or is a notebook."""

  def __init__(self) -> None:
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name="rollout requests", daemon=True)
    self._thread.start()

  def start(self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  def close(self, last: Coroutine[Any, Any, None]) -> None:
    async def end() -> None:
      others = asyncio.all_tasks() - {asyncio.current_task()}
      for task in others:
        task.cancel()
      await asyncio.gather(*others, return_exceptions=True)
      await last

    try:
      self.start(end()).result(10)
    except TimeoutError:  # the thread is a daemon: it does not keep the process
      return
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(10)
    self._loop.close()
