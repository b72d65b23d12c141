"""What one HTTP request asks of the engine, and the events that come back."""

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections.abc import AsyncIterator, Callable
from typing import Literal

from zeda_jax.rollout.requests import Request
from zeda_jax.serve.errors import ApiError
from zeda_jax.serve.text import Decode, ResponseText

FinishReason = Literal["stop", "length"]
_FLOOR = -9999.0  # JSON has no -Infinity; OpenAI's own stand-in
_SCORE_EVERY = 16


@dataclasses.dataclass(frozen=True)
class TokenInfo:
  """One token of a prompt or response.

  Attributes:
    logprob: None for the first token of a prompt, which nothing predicts.
    top: the best alternatives (id, log-probability), the best first.
  """

  id: int
  logprob: float | None
  top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Delta:
  """More of one choice; `prompt_infos` come with its first delta, where they are asked for."""

  index: int
  text: str
  tokens: list[int]
  infos: list[TokenInfo]
  prompt_infos: list[TokenInfo]


@dataclasses.dataclass(frozen=True)
class Finished:
  """The end of one choice.

  Attributes:
    num_tokens: of the response, the one that stopped it included.
    passes: forward passes that predicted the response; where nothing was sampled, those that read the prompt.
    zero_ratio: share of their picks that were zero experts.
    stopped_by: the stop string, or the token of the request's own, that ended it; None for EOS and the limit of tokens.
  """

  index: int
  reason: FinishReason
  num_tokens: int
  passes: int
  zero_ratio: float
  stopped_by: str | int | None = None


@dataclasses.dataclass(frozen=True)
class Closed:
  """The last event of a job: the engine holds nothing of it any more."""

  error: ApiError | None = None


Event = Delta | Finished | Closed


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt, its responses, and what is wanted of them.

  Attributes:
    tokens: of the prompt.
    request: what to sample; None where the prompt is only scored.
    zero_expert_bias: of the request.
    stops: strings that end a response.
    stop_tokens: those of `request.stop_ids` that are no EOS.
    with_infos: give log-probabilities of sampled tokens.
    with_prompt_infos: and of the prompt's.
    num_top: alternatives for each of them.
  """

  tokens: list[int]
  request: Request | None
  zero_expert_bias: float
  stops: tuple[str, ...]
  stop_tokens: tuple[int, ...]
  with_infos: bool
  with_prompt_infos: bool
  num_top: int

  @property
  def is_scored(self) -> bool:
    """Whether a pass over the finished text is needed: the engine gives log-probabilities of what it samples only, and
    none of what it might have sampled."""
    return self.request is None or self.with_prompt_infos or (self.with_infos and self.num_top > 0)

  @property
  def num_choices(self) -> int:
    return 1 if self.request is None else self.request.n


class Job:
  """The prompts of one HTTP request. Made in the event loop; the worker's thread sends the events.

  Args:
    prompts: at least one.
    streamed: whether the events are wanted as soon as there are any.
    decode: token ids to the text that clients see.
    on_closed: called in the event loop when the engine holds nothing of it any more.
  """

  def __init__(self, prompts: list[Prompt], streamed: bool, decode: Decode, on_closed: Callable[[], None]):
    self.prompts, self.streamed, self.on_closed = prompts, streamed, on_closed
    counter = itertools.count()
    self.choices = [[Choice(self, next(counter), p, decode) for _ in range(p.num_choices)] for p in prompts]
    self.num_open = sum(map(len, self.choices))
    self.is_closed = False  # the worker's own; others wait for Closed
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[Event] = asyncio.Queue()

  def send(self, event: Event) -> None:
    """From any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
      self._loop.call_soon_threadsafe(self._receive, event)

  def _receive(self, event: Event) -> None:
    if isinstance(event, Closed):
      self.on_closed()
    self._events.put_nowait(event)

  async def events(self) -> AsyncIterator[Delta | Finished]:
    """All events up to the end.

    Raises:
      ApiError: the job failed.
    """
    while True:
      event = await self._events.get()
      if not isinstance(event, Closed):
        yield event
      elif event.error is not None:
        raise event.error
      else:
        return


class Choice:
  """One response while it grows; the worker's thread alone uses it.

  What is ready to be sent leaves by `take`: at once, or where log-probabilities are read from a pass over the whole
  text, once that was made. While a response is streamed, this pass is made anew whenever the text has grown by a
  quarter, so that all of them together cost a few times the last.
  """

  def __init__(self, job: Job, index: int, prompt: Prompt, decode: Decode):
    self.job, self.index, self.prompt = job, index, prompt
    self.tokens: list[int] = []
    self.end: Finished | None = None  # known, though perhaps not sent
    self.is_scoring = False
    self._text = ResponseText(decode, prompt.stops)
    self._logprobs: list[float] = []
    self._unsent = ""
    self._num_sent = 0  # tokens whose infos were sent
    self._sent_prompt = False

  def add(self, tokens: list[int], logprobs: list[float]) -> bool:
    """Takes sampled tokens; whether a stop string has ended the response."""
    assert self.prompt.request is not None
    # The token that ends a response is no part of its text, special or not.
    has_end = bool(tokens) and tokens[-1] in (self.prompt.request.stop_ids or ())
    text, count = self._text.add(tokens[:-1] if has_end else tokens)
    count += has_end and not self._text.stopped
    self._unsent += text
    self.tokens += tokens[:count]
    self._logprobs += logprobs[:count]
    return bool(self._text.stopped)

  def finish(self, reason: FinishReason, passes: int, zero_ratio: float) -> None:
    if not self._text.stopped:
      self._unsent += self._text.finish()  # which may complete a stop string
    stopped_by: str | int | None = self._text.stopped
    if stopped_by is not None:
      reason = "stop"
    elif reason == "stop" and self.tokens[-1] in self.prompt.stop_tokens:
      stopped_by = self.tokens[-1]
    self.end = Finished(self.index, reason, len(self.tokens), passes, zero_ratio, stopped_by)

  @property
  def wants_scoring(self) -> bool:
    if not self.prompt.is_scored or self.is_scoring:
      return False
    if self.end is not None or self.prompt.request is None:
      return True
    length = len(self.prompt.tokens) + len(self.tokens)
    return self.job.streamed and len(self.tokens) - self._num_sent >= max(_SCORE_EVERY, length // 4)

  def take(self, logprobs: list[float] | None = None, top: list[list[tuple[int, float]]] | None = None) -> Delta:
    """What is ready; `logprobs` and `top` are those of a pass over prompt and tokens, from the second token on."""
    start, before = self._num_sent, len(self.prompt.tokens) - 1
    self._num_sent = len(self.tokens)
    infos, prompt_infos = [], []
    if self.prompt.with_infos:
      scored = None if logprobs is None or self.prompt.num_top == 0 else logprobs[before:]
      for i in range(start, self._num_sent):
        best = [] if top is None else top[before + i]
        infos.append(self._info(self.tokens[i], (scored or self._logprobs)[i], best))
    if self.prompt.with_prompt_infos and not self._sent_prompt:
      assert logprobs is not None and top is not None
      prompt_infos = [TokenInfo(self.prompt.tokens[0], None, [])]
      for token, logprob, best in zip(self.prompt.tokens[1:], logprobs, top, strict=False):
        prompt_infos.append(self._info(token, logprob, best))
    self._sent_prompt = True
    text, self._unsent = self._unsent, ""
    return Delta(self.index, text, self.tokens[start:], infos, prompt_infos)

  def _info(self, token: int, logprob: float, top: list[tuple[int, float]]) -> TokenInfo:
    finite = lambda x: x if math.isfinite(x) else _FLOOR
    best = [(id, finite(value)) for id, value in top[: self.prompt.num_top]]
    return TokenInfo(token, finite(logprob), best)
