"""The thread that owns the engine. Others hand it jobs and cancellations; nothing else touches the engine."""

import collections
import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable

from zeda_jax.errors import ZedaError
from zeda_jax.rollout.requests import Update
from zeda_jax.rollout.statistics import Statistics
from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.jobs import Choice, Closed, Job
from zeda_jax.serve.scoring import Scorer
from zeda_jax.serve.serving_engine import ServingEngine

_RATE_SECONDS = 10.0  # tokens per second are those of so long


class Worker:
  """Runs jobs until it is stopped.

  Args:
    engine: used by this thread alone from `start` on.
    scorer: likewise.
    on_failure: called, from the worker's thread, when the engine has failed and no job can be run any more.
  """

  def __init__(self, engine: ServingEngine, scorer: Scorer, on_failure: Callable[[], None] = lambda: None):
    self.statistics: Statistics = engine.statistics()  # replaced as a whole after each step
    self.num_scoring = 0  # sequences that wait to be scored
    self.scored_tokens = 0
    self.has_failed = False
    self._engine, self._scorer, self._on_failure = engine, scorer, on_failure
    self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
    self._lock = threading.Lock()  # of _failure, with what is put into _commands
    self._choices: dict[tuple[int, int], Choice] = {}  # by number of the engine's request, and of its response
    self._scoring: list[Choice] = []
    self._rates: collections.deque[tuple[float, int]] = collections.deque(maxlen=4096)
    self._failure: str | None = None
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread after the work at hand; jobs that are not complete are closed with an error."""
    self._commands.put(("stop", None))
    self._thread.join()

  @property
  def failure(self) -> str | None:
    return self._failure

  def submit(self, job: Job) -> None:
    """Queues a job, whose events end with Closed, whatever happens."""
    with self._lock:
      if self._failure is None:
        self._commands.put(("add", job))
        return
    job.send(Closed(ApiError(503, self._failure)))

  def cancel(self, job: Job) -> None:
    """Frees what a job holds; nothing if it is closed."""
    self._commands.put(("cancel", job))

  def tokens_per_second(self) -> float:
    now = time.monotonic()
    recent = [count for at, count in list(self._rates) if at > now - _RATE_SECONDS]
    return sum(recent) / _RATE_SECONDS

  # --- the thread ---------------------------------------------------------------------------------------------------

  def _run(self) -> None:
    failure = None
    try:
      while self._obey():
        self._score()
        before = self.statistics.new_tokens
        for update in self._engine.step():
          self._take(update)
        self.statistics = self._engine.statistics()
        self._rates.append((time.monotonic(), self.statistics.new_tokens - before))
    except BaseException as error:
      traceback.print_exc()
      failure = f"The engine has failed ({type(error).__name__})"
    self._refuse_all(f"{failure or 'The server is stopping'}: try again later.")
    if failure is not None:
      self.has_failed = True
      self._on_failure()

  def _obey(self) -> bool:
    """Does what was asked, and waits where there is nothing else to do; False to stop."""
    is_idle = self._engine.is_idle and not self._scoring
    while True:
      try:
        what, job = self._commands.get(block=is_idle)
      except queue.Empty:
        return True
      if job is None:
        return False
      if what == "add":
        self._add(job)
      else:
        self._close(job, None)
      is_idle = False

  def _refuse_all(self, reason: str) -> None:
    with self._lock:  # nothing is queued from now on
      self._failure = reason
    jobs = [choice.job for choice in (*self._choices.values(), *self._scoring)]
    with contextlib.suppress(queue.Empty):
      while True:
        jobs += [job for _, job in [self._commands.get(block=False)] if job is not None]
    for job in jobs:
      self._end(job, ApiError(503, reason))

  def _add(self, job: Job) -> None:
    try:
      for prompt, choices in zip(job.prompts, job.choices, strict=True):
        if prompt.request is None:
          self._scoring += choices
          choices[0].is_scoring = True
          continue
        number = self._engine.add(prompt.request)
        self._choices |= {(number, i): choice for i, choice in enumerate(choices)}
    except ZedaError as error:
      self._close(job, ApiError(400, str(error)))
    except Exception as error:
      traceback.print_exc()
      self._close(job, ApiError(500, f"The request could not be queued ({type(error).__name__})."))

  def _close(self, job: Job, error: ApiError | None) -> None:
    """Frees all that a job holds."""
    if job.is_closed:
      return
    for number in {number for (number, _), choice in self._choices.items() if choice.job is job}:
      self._engine.cancel(number)
    self._end(job, error)

  def _end(self, job: Job, error: ApiError | None) -> None:
    if job.is_closed:
      return
    self._choices = {key: choice for key, choice in self._choices.items() if choice.job is not job}
    self._scoring = [choice for choice in self._scoring if choice.job is not job]
    job.is_closed = True
    self.statistics = self._engine.statistics()  # first: who is told that all is free will find it so
    job.send(Closed(error))

  # --- results ------------------------------------------------------------------------------------------------------

  def _take(self, update: Update) -> None:
    choice = self._choices.get((update.id, update.index))
    if choice is None:
      return
    try:
      self._take_for(choice, update)
    except Exception as error:  # of its text: the engine and the others go on
      traceback.print_exc()
      self._close(choice.job, ApiError(500, f"The response could not be made ({type(error).__name__})."))

  def _take_for(self, choice: Choice, update: Update) -> None:
    stopped = choice.add(update.tokens, update.logprobs)
    completion = update.completion
    if stopped and completion is None:
      completion = self._engine.finish(update.id, update.index)
    if completion is not None:
      del self._choices[update.id, update.index]
      choice.finish(completion.finish_reason, len(completion.tokens), completion.zero_ratio)
    if choice.wants_scoring:
      choice.is_scoring = True
      self._scoring.append(choice)
    elif not choice.prompt.is_scored:
      self._deliver(choice)

  def _score(self) -> None:
    """Scores one batch of sequences: the first that waits, and what is of about its length."""
    self.num_scoring = len(self._scoring)
    if not self._scoring:
      return
    length = lambda choice: len(choice.prompt.tokens) + len(choice.tokens)
    bucket = self._scorer.bucket(length(self._scoring[0]))
    batch = [c for c in self._scoring if self._scorer.bucket(length(c)) == bucket][: self._scorer.batch_size(bucket)]
    self._scoring = [choice for choice in self._scoring if not any(choice is other for other in batch)]
    sequences = [[*choice.prompt.tokens, *choice.tokens] for choice in batch]
    biases = [choice.prompt.zero_expert_bias for choice in batch]
    try:
      found = self._scorer(sequences, biases, max(choice.prompt.num_top for choice in batch))
    except Exception as error:  # such as memory for a long row: the engine has what it had
      traceback.print_exc()
      for choice in batch:
        self._close(choice.job, ApiError(500, f"The prompt could not be scored ({type(error).__name__})."))
      return
    self.scored_tokens += sum(map(len, sequences))
    for choice, scored in zip(batch, found, strict=True):
      choice.is_scoring = False
      if choice.prompt.request is None:
        choice.finish("length", len(choice.prompt.tokens), scored.zero_ratio)
      self._deliver(choice, scored.logprobs, scored.top)

  def _deliver(
    self,
    choice: Choice,
    logprobs: list[float] | None = None,
    top: list[list[tuple[int, float]]] | None = None,
  ) -> None:
    job = choice.job
    if job.streamed or choice.end is not None:
      job.send(choice.take(logprobs, top))
    if choice.end is not None:
      job.send(choice.end)
      job.num_open -= 1
      if job.num_open == 0:
        self._end(job, None)
